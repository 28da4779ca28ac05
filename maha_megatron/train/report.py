"""What a person sees of a run: a line while it goes, a plot and a summary at its end. Rank 0 only."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from matplotlib.figure import Figure

from maha_megatron.checkpoint.layout import replace_text
from maha_megatron.train.metrics import METRICS, TENSORBOARD, read_rows
from maha_megatron.units import format_bytes, format_count, format_duration

PLOT = "loss.png"
SUMMARY = "summary.json"
SHOWN_WAIT_FRAC = 0.02
"""Share of a step's time from which on waiting for data is shown."""


class Console:
    """Progress: one line that updates itself on a terminal, one plain line per logged step anywhere else.

    Args:
        steps: steps of the whole run.
        stream: where it is written; None on ranks that stay silent.
    """

    def __init__(self, steps: int, stream: TextIO | None = sys.stdout) -> None:
        self._steps, self._stream = steps, stream
        self._updates_line = stream is not None and stream.isatty()
        self._line_open = False

    def progress(self, step: int, loss_nats: float, step_s: float) -> None:
        """After every step: update the line on a terminal; nothing in a file."""
        if self._updates_line:
            left = format_duration((self._steps - step) * step_s)
            self._stream.write(f"\r\033[Kstep {step}/{self._steps}  loss {loss_nats:.4f} nats  {left} left")
            self._stream.flush()
            self._line_open = True

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """A logged step."""
        parts = [f"step {step}/{self._steps}"]
        if "loss_nats" in row:
            parts += [
                f"loss {row['loss_nats']:.4f} nats",
                f"learning rate {row['learning_rate']:.3g}",
                f"gradient norm {row['gradient_norm']:.3g}",
                f"{format_count(row['tokens_per_s'])} tokens/s",
            ]
            if "mfu_frac" in row:
                parts.append(f"MFU {100 * row['mfu_frac']:.1f} %")
            if row.get("data_wait_s", 0) > SHOWN_WAIT_FRAC * row.get("step_s", 0):
                parts.append(f"waiting for data {100 * row['data_wait_s'] / row['step_s']:.0f} %")
            parts.append(format_bytes(row["memory_bytes"]))
        if "validation_loss_nats" in row:
            parts.append(f"validation loss {row['validation_loss_nats']:.4f} nats")
        self.say("  ".join(parts))

    def say(self, text: str) -> None:
        """One line of its own."""
        if self._stream is not None:
            self._stream.write(("\r\033[K" if self._line_open else "") + text + "\n")
            self._stream.flush()
            self._line_open = False


def plot_losses(folder: Path, title: str) -> Path:
    """Draw train and validation loss from the run's metrics.jsonl, which stays beside the picture as its data.

    Returns:
        The PNG.
    """
    rows = read_rows(folder / METRICS)
    figure = Figure(figsize=(8, 5), dpi=120)  # without pyplot: no display, no global state
    axes = figure.add_subplot()
    for name, label, style in (("loss_nats", "train", "-"), ("validation_loss_nats", "validation", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    partial = folder / f"{PLOT}.partial"
    figure.savefig(partial, format="png", bbox_inches="tight")
    os.replace(partial, folder / PLOT)
    return folder / PLOT


def summarise(folder: Path, name: str, console: Console, facts: Mapping[str, Any]) -> None:
    """Write summary.json and say where everything is.

    Args:
        folder: the run's folder.
        name: the run's name.
        console: where it is said.
        facts: steps, tokens, seconds and the last losses, under their names in metrics.jsonl.
    """
    plot = plot_losses(folder, name)
    replace_text(folder / SUMMARY, json.dumps({"name": name, **facts}, indent=2) + "\n")
    console.say(f"run folder       {folder}")
    console.say(f"TensorBoard      tensorboard --logdir {folder / TENSORBOARD}")
    console.say(f"loss plot        {plot} (its data: {folder / METRICS})")
    console.say(f"trained          {facts['steps']} steps, {format_count(facts['tokens'])} tokens")
    if "validation_loss_nats" not in facts:  # somebody removed metrics.jsonl
        return
    line = f"validation loss  {facts['validation_loss_nats']:.4f} nats a token"
    if "validation_bits_per_byte" in facts:
        line += f", {facts['validation_bits_per_byte']:.4f} bits a byte"
    console.say(line)
    if "nats_below_unigram_entropy" in facts:
        below = facts["nats_below_unigram_entropy"]
        distance = f"{abs(below):.2f} nats {'below' if below >= 0 else 'above'}"
        console.say(
            f"learned          {distance} the text's unigram entropy of {facts['unigram_entropy_nats']:.4f} nats a "
            "token, the loss of knowing token counts alone"
        )
