"""A tiny prepared corpus, and pretraining started as a user starts it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from maha_megatron.parallel.compat import free_port
from maha_megatron.train.metrics import METRICS, read_rows
from tests.support.forks import HAS_FORKS, run_forked

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.model and text_text_document.bin/.idx: this package's own sources, 512 pieces."""
    folder = tmp_path_factory.mktemp("corpus")
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for path in sorted((ROOT / "maha_megatron").rglob("*.py")):
            file.write(json.dumps({"text": path.read_text(encoding="utf-8")}) + "\n")
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.model"
    forked("data_prep/train_tokenizer.py", "--input", text, "--output", tokenizer, "--vocabulary", 512)
    prefix = folder / "text"
    forked(
        *("data_prep/preprocess.py", "--input", text, "--output-prefix", prefix),
        *("--tokenizer-model", tokenizer, "--append-eod", "--workers", 1),
    )
    return folder


def write_config(corpus: Path, path: Path, run_folder: Path) -> Path:
    """A two-layer hybrid, 8 samples of 64 tokens a step in micro-batches of 2, constant learning rate."""
    path.write_text(
        f"""
run: {{name: tiny, folder: {run_folder}}}
model: {{layers: 2, hidden: 32, heads: 4, kv_groups: 2, head_width: 8, ffn_hidden: 64, attention: [maha, dense],
         vocabulary: 512}}
maha: {{ratio: 2, windows: [8, 6, 16]}}
data: {{sequence_tokens: 64, train: [{{prefix: {corpus}/text_text_document}}], validation_frac: 0.1,
        tokenizer: {corpus}/tokenizer.model}}
schedule: {{kind: constant, peak: 1.0e-2, warmup_steps: 2}}
train: {{steps: 10, global_batch_samples: 8, micro_batch_samples: 2, precision: fp32, validation_interval_steps: 5,
         validation_samples: 5, log_interval_steps: 1}}
parallel: {{timeout_minutes: 2.0}}
checkpoint: {{interval_steps: 5}}
""",
        encoding="utf-8",
    )
    return path


def import_path() -> str:
    """This tree first, then what PYTHONPATH names already."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def launcher(kind: str, ranks: int = 1) -> list[str]:
    """The words before the script."""
    bin_folder = Path(sys.executable).parent
    port = str(free_port())
    return {
        "python": [sys.executable],
        "torchrun": [str(bin_folder / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port],
        "deepspeed": [str(bin_folder / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port],
    }[kind]


@contextmanager
def started(
    config: Path, *overrides: str, kind: str = "python", ranks: int = 1, extra: Sequence[str] = ()
) -> Iterator[subprocess.Popen]:
    """Pretraining that is running; whatever of it still runs at the end is killed."""
    words = [*launcher(kind, ranks), str(ROOT / "launch/pretrain.py"), "--config", str(config)]
    for override in overrides:
        words += ["--set", override]
    words += extra
    process = subprocess.Popen(words, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        kill(process)


def finish(process: subprocess.Popen, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """Exit code and output; at the time-out everything it started is killed."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout_s} s:\n{output[-3000:]}")
    return process.returncode, output


def pretrain(config: Path, *overrides: str, **how: Any) -> tuple[int, str]:
    """Start and wait: exit code and output."""
    with started(config, *overrides, **how) as process:
        return finish(process)


def processes(process: subprocess.Popen) -> list[psutil.Process]:
    """A started process and everything below it, also in other sessions (torchrun gives each rank its own)."""
    try:
        top = psutil.Process(process.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def rank_processes(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below a launcher: those whose program is pretrain.py."""
    return [found for found in processes(process) if any(word.endswith("pretrain.py") for word in found.cmdline()[1:3])]


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a started process and everything below it."""
    for found in processes(process):
        with suppress(psutil.NoSuchProcess):
            found.kill()
    process.wait()


def wait_for_step(process: subprocess.Popen, run_folder: Path, step: int, timeout_s: float = TIMEOUT_S) -> None:
    """Until the run has logged `step`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step for row in read_rows(run_folder / METRICS)):
            return
        time.sleep(0.02)
    kill(process)
    pytest.fail(f"step {step} was not reached:\n{process.communicate()[0][-3000:]}")


def tool(script: str, *arguments: object, expected: int = 0) -> str:
    """Run one of the project's command lines; its output."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == expected, f"{script} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def forked(script: str, *arguments: object, expected: int = 0) -> str:
    """As `tool`, without the seconds in which Python imports megatron-core and DeepSpeed: for what comes after them."""
    if not HAS_FORKS:
        return tool(script, *arguments, expected=expected)
    words = [str(ROOT / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        code = run_forked(words, _environment(), Path(folder) / "output", TIMEOUT_S)
        output = (Path(folder) / "output").read_text(encoding="utf-8")
    assert code == expected, f"{script} ended with {code}:\n{output}"
    return output


def forked_pretrain(config: Path, *overrides: str, extra: Sequence[str] = (), expected: int = 0) -> str:
    """Pretraining of one process by `forked`."""
    words = [word for override in overrides for word in ("--set", override)]
    return forked("launch/pretrain.py", "--config", config, *words, *extra, expected=expected)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": import_path()}
