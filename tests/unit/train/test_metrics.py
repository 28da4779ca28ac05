"""metrics.jsonl over crashes and resumes, throughput by hand, and what a stated peak does."""

import json
from pathlib import Path

import pytest

from maha_megatron.train.metrics import METRICS, TENSORBOARD, MetricsLog, Throughput, peak_tflops, read_rows


def write(folder: Path, last_step: int, steps: range, loss: float) -> None:
    log = MetricsLog(folder, last_step)
    for step in steps:
        log.write(step, {"loss_nats": loss})
    log.close()


def test_resume_cuts_the_rows_after_the_checkpoint_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 8), loss=1.0)  # killed after step 7, its last checkpoint is of step 5
    write(tmp_path, 5, range(6, 11), loss=2.0)
    rows = read_rows(tmp_path / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss_nats"] for row in rows] == [1.0] * 5 + [2.0] * 5


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4), loss=1.0)
    write(tmp_path, 0, range(1, 2), loss=2.0)
    assert read_rows(tmp_path / METRICS) == [{"step": 1, "loss_nats": 2.0}]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4), loss=1.0)
    path = tmp_path / METRICS
    path.write_text(path.read_text()[:-5])
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    write(tmp_path, 3, range(4, 5), loss=1.0)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4]


def test_every_row_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss_nats": 3.0})
    assert read_rows(tmp_path / METRICS) == [{"step": 1, "loss_nats": 3.0}]
    log.close()


def test_tensorboard_has_the_same_names(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss_nats": 3.0, "scale_weight/layer_03/scale_1": 0.25})
    log.close()
    events = EventAccumulator(str(tmp_path / TENSORBOARD))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss_nats", "scale_weight/layer_03/scale_1"}
    assert events.Scalars("scale_weight/layer_03/scale_1")[0].value == 0.25


def test_throughput_by_hand() -> None:
    # 2 steps of 100 tokens in 0.5 s: 400 tokens/s; at 1e10 FLOP a token that is 4 TFLOP/s, 2 on each of 2 devices
    throughput = Throughput(1e10, devices=2, peak_tflops=8.0)
    throughput.add(0.2, 100, 0.04)
    throughput.add(0.3, 100, 0.0)
    expected = {"step_s": 0.25, "data_wait_s": 0.02, "tokens_per_s": 400.0, "tflops_per_device": 2.0, "mfu_frac": 0.25}
    assert throughput.take() == pytest.approx(expected)
    throughput.add(1.0, 100, 0.0)
    assert throughput.take()["tokens_per_s"] == pytest.approx(100.0)


def test_mfu_is_absent_without_a_peak() -> None:
    throughput = Throughput(1e10, devices=1, peak_tflops=None)
    throughput.add(1.0, 1, 0.0)
    assert "mfu_frac" not in throughput.take()


def test_peak_is_the_configured_one_or_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops(123.0, "fp32") == 123.0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peak_tflops(0.0, "bf16") == 989.0
    assert peak_tflops(0.0, "fp32") is None
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 PCIe")
    assert peak_tflops(0.0, "bf16") == 756.0
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Unheard-of 1")
    assert peak_tflops(0.0, "bf16") is None
