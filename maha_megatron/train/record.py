"""What a run was made with: resolved configuration, package versions, code revision. Kept in run.json and manifests."""

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import maha_megatron
from maha_megatron.checkpoint.layout import replace_text
from maha_megatron.config.load import config_to_dict
from maha_megatron.config.schema import Config

RECORD = "run.json"


def versions() -> dict[str, str]:
    """Versions of what determines a run's numbers, and the code's git revision where there is one."""
    found = {"python": platform.python_version(), "maha_megatron": maha_megatron.__version__}
    found |= {name: version(name) for name in ("torch", "deepspeed", "megatron-core", "numpy")}
    revision = _git("rev-parse", "HEAD")
    if revision:
        found["git_revision"] = revision + ("-modified" if _git("status", "--porcelain") else "")
    return found


def write_record(config: Config, world_size: int, versions: Mapping[str, str]) -> None:
    """Write run.json into the run's folder."""
    record = {"world_size": world_size, "versions": dict(versions), "config": config_to_dict(config)}
    replace_text(Path(config.run.folder) / RECORD, json.dumps(record, indent=2) + "\n")


def _git(*arguments: str) -> str:
    try:
        folder = Path(maha_megatron.__file__).parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
