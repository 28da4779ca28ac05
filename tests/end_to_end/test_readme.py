"""The README's plain commands run as they are written, at small settings, one after another."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from maha_megatron.parallel.compat import free_port

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- plain-commands: .*? -->\n```bash\n(.*?)```", re.DOTALL)

# what makes a command small, by the script that it runs; everything else of it stays as the README has it
SMALL = {
    "data_prep/make_corpus.py": ["--bytes", "2MB"],
    "data_prep/train_tokenizer.py": [],
    "data_prep/preprocess.py": [],
    "launch/pretrain.py": [
        *("--set", "train.steps=3"),
        *("--set", "schedule.warmup_steps=1"),
        *("--set", "train.validation_samples=4"),
    ],
    "tools/generate.py": [],
}


def plain_commands() -> list[list[str]]:
    """The commands of the README's block, split as a shell splits them; activation of the environment left out."""
    text = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8")).group(1)
    commands = [shlex.split(line) for line in text.splitlines()]
    assert commands[0] == ["source", ".venv/bin/activate"]
    return commands[1:]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout and takes what the commands write."""
    for name in ("configs", "data_prep", "launch", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_plain_commands_run_as_written(checkout: Path) -> None:
    commands = plain_commands()
    assert [next(word for word in command if word.endswith(".py")) for command in commands] == list(SMALL)
    for command, small in zip(commands, SMALL.values(), strict=True):
        if command[0] == "deepspeed":
            command[1:1] = ["--master_port", str(free_port())]
        done = subprocess.run(
            [*command, *small],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "validation_loss_nats" in (checkout / "runs/quickstart/train/summary.json").read_text()
    assert done.stdout.startswith("def "), done.stdout
