"""What a kill or a full disk leaves: the next run continues, and the bytes are those of an undisturbed run."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from maha_megatron.data import writing
from maha_megatron.data.manifest import read_manifest
from maha_megatron.data.pair import check_pair
from maha_megatron.data.prepare import spool
from maha_megatron.data.prepare.encode import Output
from maha_megatron.data.prepare.encoding import leave_interrupts_to_parent, start_worker
from maha_megatron.data.prepare.inputs import list_inputs
from maha_megatron.data.prepare.partitions import write_in_partitions
from maha_megatron.data.prepare.work_folder import ENDINGS, remove_leftover
from maha_megatron.errors import DataError
from tests.support.corpora import odd_corpus, pair_bytes, sentencepiece_model, settings_for, write_inputs
from tests.support.runs import ROOT, import_path


class FullDisk(Exception):
    """The error for the user says that the disk is full."""


DOCUMENTS, KILLS = 1500, 3
FULL_DOCUMENTS, FULL_KILLS = 120_000, 20
STRAIGHT_S = 10.0  # of an undisturbed run in one process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sentencepiece_model(tmp_path_factory.mktemp("tokenizer") / "small.model")


def start(corpus: Path, prefix: Path, model: str, *more: object) -> subprocess.Popen:
    """Preprocessing as a user runs it, in a session of its own."""
    words = [sys.executable, ROOT / "data_prep/preprocess.py", "--input", corpus, "--output-prefix", prefix]
    words += ["--tokenizer-model", model, *more]
    return subprocess.Popen(
        list(map(str, words)),
        env={**os.environ, "PYTHONPATH": import_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_at_random(
    corpus: Path, prefix: Path, model: str, straight: Path, *more: object, kills: int, longest_s: float, seed: int
) -> list[int]:
    """Start and kill the main process with SIGKILL at random moments, until it was hit so often; then run to the end.

    A run that ends before its kill has its bytes compared too, and the next one begins anew.

    Returns:
        For each kill that hit, how many documents the state on the disk then vouched for.
    """
    chance, pair = random.Random(seed), Path(f"{prefix}_text_document")
    vouched: list[int] = []
    while True:
        process = start(corpus, prefix, model, *more)
        if len(vouched) < kills:
            time.sleep(chance.uniform(0.3, longest_s))
            process.kill()
        output, _ = process.communicate(timeout=600)
        assert process.returncode in (-signal.SIGKILL, 0), output
        if process.returncode:
            states = [json.loads(path.read_text()) for path in prefix.parent.glob(f"{pair.name}*.partial/state.json")]
            vouched.append(sum(source["documents"] for state in states for source in state["sources"]))
            continue
        assert pair_bytes(pair) == pair_bytes(straight)
        assert not list(prefix.parent.glob("*partial*")) + list(prefix.parent.glob("*partition*"))
        if len(vouched) == kills:
            return vouched
        for path in pair.parent.glob(f"{pair.name}*"):
            path.unlink()


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--workers", 1), marks=pytest.mark.full),
        pytest.param(("--workers", 2), marks=pytest.mark.full),
        ("--workers", 2, "--partitions", 2),
    ],
)
def test_killed_and_continued_gives_the_same_bytes(tmp_path: Path, model: str, more: tuple) -> None:
    corpus, straight = tmp_path / "odd.jsonl", tmp_path / "straight"
    odd_corpus(corpus, 8 * DOCUMENTS)
    write_inputs([corpus], straight, settings_for(model))
    vouched = kill_at_random(corpus, tmp_path / "p", model, straight, *more, kills=KILLS, longest_s=1.2, seed=1)
    assert len(vouched) == KILLS


@pytest.mark.full
@pytest.mark.parametrize("more", [("--workers", 2), ("--workers", 2, "--partitions", 3)])
def test_killed_twenty_times_gives_the_same_bytes(tmp_path: Path, model: str, more: tuple) -> None:
    corpus, straight = tmp_path / "odd.jsonl", tmp_path / "straight"
    documents, elapsed_s = FULL_DOCUMENTS, 0.0
    while elapsed_s < STRAIGHT_S:  # several times as long as from one commit to the next, on a fast machine too
        odd_corpus(corpus, documents)
        begun_s = time.monotonic()
        write_inputs([corpus], straight, settings_for(model))
        elapsed_s = time.monotonic() - begun_s
        documents = int(documents * 1.2 * STRAIGHT_S / elapsed_s)
    vouched = kill_at_random(corpus, tmp_path / "p", model, straight, *more, kills=FULL_KILLS, longest_s=5.0, seed=2)
    assert len(vouched) == FULL_KILLS
    assert sum(documents > 0 for documents in vouched) >= 5  # there was something to continue


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_a_run_goes_on_where_it_was_committed(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """Every block is committed, the run dies after some of them, and the files were written beyond the last commit."""
    monkeypatch.setattr("maha_megatron.data.prepare.blocks.BLOCK_BYTES", 20_000)
    corpus = tmp_path / "odd.jsonl"
    odd_corpus(corpus, DOCUMENTS, long_bytes=0)
    expected = write_inputs([corpus], tmp_path / "straight", settings_for(model))
    monkeypatch.setattr(spool, "COMMIT_INTERVAL_S", -1.0)
    seen = []

    def die(progress) -> None:
        seen.append(progress.documents)
        if len(seen) == blocks + 1:
            with open(progress._folder / "pair.bin", "ab") as stream:
                stream.write(b"not committed")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_inputs([corpus], tmp_path / "p", settings_for(model), advance=die)
    assert not Path(f"{tmp_path}/p.bin").exists()
    said, first = [], []
    found = write_inputs(
        [corpus],
        tmp_path / "p",
        settings_for(model),
        say=said.append,
        advance=lambda progress: first.append(progress.documents),
    )
    assert first[0] == seen[-1] > 0
    assert "continuing" in said[0]
    assert found == expected
    assert pair_bytes(tmp_path / "p") == pair_bytes(tmp_path / "straight")


@pytest.mark.parametrize("named", range(6))
def test_a_pair_is_never_half_new_and_half_old(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, named: int
) -> None:
    """Killed after so many files got their final names, over an old pair that has more of them."""
    odd_corpus(tmp_path / "old.jsonl", 200, seed=1, long_bytes=0)
    (tmp_path / "new.jsonl").write_text('{"text": "some text without a bad line"}\n' * 20)
    write_inputs([tmp_path / "new.jsonl"], tmp_path / "straight", settings_for(model))
    write_inputs([tmp_path / "old.jsonl"], tmp_path / "p", settings_for(model))
    plain, left = os.replace, named

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        if Path(target).name in {f"p.{ending}" for ending in ENDINGS}:
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with contextlib.suppress(KeyboardInterrupt):
        write_inputs([tmp_path / "new.jsonl"], tmp_path / "p", settings_for(model))
    assert (tmp_path / "p.manifest.json").exists() == (named >= 4)  # of five files a pair without bad lines has four
    assert not (tmp_path / "p.idx").exists() or pair_bytes(tmp_path / "p") == pair_bytes(tmp_path / "straight")
    monkeypatch.undo()
    write_inputs([tmp_path / "new.jsonl"], tmp_path / "p", settings_for(model))
    assert pair_bytes(tmp_path / "p") == pair_bytes(tmp_path / "straight")
    assert {path.name for path in tmp_path.glob("p.*")} == {f"p.{ending}" for ending in ENDINGS} - {"p.bad_lines.jsonl"}


def test_what_a_finished_run_left_does_not_cost_its_pair(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its last step; then another run of the same arguments begins, and dies."""
    odd_corpus(tmp_path / "odd.jsonl", 100, long_bytes=0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        write_inputs([tmp_path / "odd.jsonl"], tmp_path / "p", settings_for(model))
    assert (tmp_path / "p.partial" / "state.json").exists()
    whole = pair_bytes(tmp_path / "p")

    def die(progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_inputs([tmp_path / "odd.jsonl"], tmp_path / "p", settings_for(model), advance=die)
    assert pair_bytes(tmp_path / "p") == whole
    check_pair(tmp_path / "p", lambda num_bytes: None)


def test_other_arguments_begin_anew(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "odd.jsonl"
    odd_corpus(corpus, 300, long_bytes=0)
    monkeypatch.setattr(spool, "COMMIT_INTERVAL_S", -1.0)

    def die(progress) -> None:
        if progress.documents:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_inputs([corpus], tmp_path / "p", settings_for(model), advance=die)
    said = []
    settings = settings_for(model, append_end=False)
    write_inputs([corpus], tmp_path / "p", settings, say=said.append)
    assert said == []
    write_inputs([corpus], tmp_path / "q", settings)
    assert pair_bytes(tmp_path / "p") == pair_bytes(tmp_path / "q")


def write_in_two(inputs: list[Path], prefix: Path, settings, advance=lambda *progress: None) -> None:
    """As write_inputs, in partitions."""
    files, outputs = list_inputs(list(map(str, inputs))), [Output("text", prefix, {"append_eod": True})]
    quiet = {"workers": 1, "revisions": {}, "say": lambda text: None}
    write_in_partitions(files, outputs, partitions=2, settings=settings, advance=advance, **quiet)


def test_two_processes_do_not_write_one_pair(tmp_path: Path, model: str) -> None:
    corpus = tmp_path / "odd.jsonl"
    odd_corpus(corpus, 100, long_bytes=0)

    def start_another(progress) -> None:
        for write in (write_inputs, write_in_two):
            with pytest.raises(DataError, match="is being written by another process"):
                write([corpus], tmp_path / "p", settings_for(model))
        remove_leftover(tmp_path / "p")  # as one that finds the pair done already does

    write_inputs([corpus], tmp_path / "p", settings_for(model), advance=start_another)
    assert read_manifest(tmp_path / "p").documents == 100


def test_nobody_takes_the_partitions_of_a_run_that_goes_on(tmp_path: Path, model: str) -> None:
    corpus = tmp_path / "odd.jsonl"
    odd_corpus(corpus, 100, long_bytes=0)
    refused = []

    def start_another(*progress) -> None:
        with pytest.raises(DataError, match="is being written by another process"):
            write_inputs([corpus], tmp_path / "p", settings_for(model))
        remove_leftover(tmp_path / "p")
        refused.append(progress)

    write_in_two([corpus], tmp_path / "p", settings_for(model), advance=start_another)
    assert refused
    assert read_manifest(tmp_path / "p").documents == 100
    assert not list(tmp_path.glob("p.partial")) + list(tmp_path.glob("p.partition-*"))


def test_a_full_disk_is_said_and_nothing_half_written_is_left(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC at the n-th write, for every n that there is; then space, and the run continues."""
    corpus = tmp_path / "odd.jsonl"
    odd_corpus(corpus, 300, long_bytes=0)
    write_inputs([corpus], tmp_path / "straight", settings_for(model))
    plain, left = writing.write, 0

    def write(stream, content) -> None:
        nonlocal left
        if left == 0:
            stream.write(bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        plain(stream, content)

    def preprocess_or_full() -> None:
        try:
            write_inputs([corpus], tmp_path / "p", settings_for(model))
        except DataError as error:
            if "No space left on device" not in str(error):
                raise
            raise FullDisk from error

    monkeypatch.setattr(writing, "write", write)
    monkeypatch.setattr(spool, "COMMIT_INTERVAL_S", -1.0)
    writes = 0
    while True:
        left = writes
        with contextlib.suppress(FullDisk):
            preprocess_or_full()
            break
        names = {path.name for path in tmp_path.glob("p.*")} - {"p.partial"}
        assert "p.manifest.json" not in names
        for name in names:  # what has its final name is whole
            assert (tmp_path / name).read_bytes() == (tmp_path / name.replace("p.", "straight.", 1)).read_bytes()
        writes += 1
    assert writes >= 8
    assert pair_bytes(tmp_path / "p") == pair_bytes(tmp_path / "straight")


def test_ctrl_c_is_left_to_the_process_that_started_the_others() -> None:
    """The terminal sends it to all of them, and each would print where it was."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start_worker, initargs=(None,)) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
    leave_interrupts_to_parent()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
