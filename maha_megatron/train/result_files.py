"""Dated records of measurements: JSON for machines and Markdown for people, with what it takes to repeat them."""

import contextlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from maha_megatron.checkpoint.layout import replace_text
from maha_megatron.train.record import versions


def hardware() -> str:
    """The machine in words: its GPUs, or its CPU and cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores {platform.machine()}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats get four significant digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in ([*header], ["---"] * len(header), *cells))


def write_result(
    folder: Path, tool: str, *, text: str, data: Mapping[str, Any], plot: Figure | None = None
) -> tuple[Path, ...]:
    """Write <tool>_<hardware>_<date>.md and .json; where that name is taken, with -2, -3 ... behind the date.

    Args:
        folder: usually tools/results.
        tool: name of the measurement.
        text: Markdown body, tables included.
        data: raw rows and settings, JSON-serialisable.
        plot: drawn from the data; written beside them as .png and shown at the end of the Markdown.

    Returns:
        Paths of the Markdown and of the JSON file, and of the plot if there is one.
    """
    today = date.today().isoformat()
    command = shlex.join(["python", *sys.argv])
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    record = {"tool": tool, "date": today, "hardware": hardware(), "versions": versions(), "command": command, **data}
    record_text = json.dumps(record, separators=(",", ":")) + "\n"
    text_path, json_path = _free_paths(folder, f"{tool}_{slug}_{today}")
    replace_text(json_path, record_text)
    facts = [f"- {name}: {record[name]}" for name in ("date", "hardware")]
    facts.append("- versions: " + ", ".join(f"{name} {number}" for name, number in record["versions"].items()))
    facts.append(f"- again: `{command}`")
    lines = [f"# {tool}", "", *facts, "", text.strip(), ""]
    written = [text_path, json_path]
    if plot is not None:
        written.append(text_path.with_suffix(".png"))
        plot.savefig(written[-1], format="png")
        lines += [f"![{tool}]({written[-1].name})", ""]
    replace_text(text_path, "\n".join(lines))
    return tuple(written)


def _free_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Markdown and JSON path that nothing has yet; the JSON file is made at once, so that no other process takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    number, stem = 1, name
    while True:
        text_path, json_path = folder / f"{stem}.md", folder / f"{stem}.json"
        if not text_path.exists():
            with contextlib.suppress(FileExistsError):
                json_path.touch(exist_ok=False)
                return text_path, json_path
        number += 1
        stem = f"{name}-{number}"
