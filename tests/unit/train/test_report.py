"""What a person sees: plain lines in a file, one updating line on a terminal, a plot whose data lies beside it."""

import io
import json
from pathlib import Path

import pytest

from maha_megatron.train.metrics import MetricsLog
from maha_megatron.train.report import PLOT, SUMMARY, Console, plot_losses, summarise

ROW = {
    "loss_nats": 2.5,
    "learning_rate": 1e-3,
    "gradient_norm": 0.7,
    "tokens_per_s": 1234.0,
    "memory_bytes": 2**30,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_one_plain_line_per_row_and_none_per_step() -> None:
    stream = io.StringIO()
    console = Console(20, stream)
    console.progress(1, 2.6, 0.1)
    console.row(2, ROW | {"validation_loss_nats": 2.75})
    assert stream.getvalue() == (
        "step 2/20  loss 2.5000 nats  learning rate 0.001  gradient norm 0.7  1.234 k tokens/s  1.00 GiB  "
        "validation loss 2.7500 nats\n"
    )


def test_a_terminal_gets_one_line_that_updates() -> None:
    stream = Terminal()
    console = Console(20, stream)
    console.progress(1, 2.6, 3.0)
    console.progress(2, 2.5, 3.0)
    assert stream.getvalue().count("\n") == 0
    assert stream.getvalue().endswith("\r\033[Kstep 2/20  loss 2.5000 nats  54.0 s left")
    console.row(2, ROW)
    assert stream.getvalue().count("\n") == 1


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(20, None)
    console.progress(1, 2.6, 0.1)
    console.say("x")
    assert capsys.readouterr().out == ""


def test_validation_alone_is_a_row() -> None:
    stream = io.StringIO()
    Console(20, stream).row(5, {"validation_loss_nats": 2.0})
    assert stream.getvalue() == "step 5/20  validation loss 2.0000 nats\n"


def test_summary_and_plot(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, ROW)
    log.write(2, ROW | {"validation_loss_nats": 2.75})
    log.close()
    stream = io.StringIO()
    facts = {"steps": 2, "tokens": 4096, "validation_loss_nats": 2.75, "validation_bits_per_byte": 1.25}
    summarise(tmp_path, "tiny", Console(2, stream), facts)
    assert json.loads((tmp_path / SUMMARY).read_text()) == {"name": "tiny", **facts}
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
    text = stream.getvalue()
    assert str(tmp_path) in text
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in text
    assert "2.7500 nats a token, 1.2500 bits a byte" in text
    assert "unigram" not in text


@pytest.mark.parametrize(("below", "said"), [(3.456, "3.46 nats below"), (-0.5, "0.50 nats above")])
def test_the_summary_compares_with_the_unigram_entropy(tmp_path: Path, below: float, said: str) -> None:
    stream = io.StringIO()
    facts = {"steps": 2, "tokens": 4096, "validation_loss_nats": 6.0 - below, "unigram_entropy_nats": 6.0}
    facts |= {"nats_below_unigram_entropy": below}
    summarise(tmp_path, "tiny", Console(2, stream), facts)
    assert f"{said} the text's unigram entropy of 6.0000 nats" in stream.getvalue()


def test_a_crash_while_writing_leaves_the_old_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"steps": 2, "tokens": 4096}
    summarise(tmp_path, "old", Console(2, io.StringIO()), facts)
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        summarise(tmp_path, "new", Console(2, io.StringIO()), facts)
    assert json.loads((tmp_path / SUMMARY).read_text())["name"] == "old"


def test_a_run_without_rows_still_plots(tmp_path: Path) -> None:
    assert plot_losses(tmp_path, "tiny").is_file()
