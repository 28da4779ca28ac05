"""The benchmark of decoding as a table."""

from collections.abc import Sequence

from maha_megatron.attention.benchmark.decode import DecodeRow
from maha_megatron.attention.benchmark.figures import Goal
from maha_megatron.attention.benchmark.step_clock import StepTimes
from maha_megatron.attention.benchmark.subjects import OURS, Setting
from maha_megatron.train.result_files import markdown_table
from maha_megatron.units import format_bytes


def report(setting: Setting, rows: Sequence[DecodeRow], goals: Sequence[Goal]) -> str:
    """Times of a token, sizes, goals and what did not run, as Markdown."""
    header = [
        "dtype", "context", "streams", "entries of the state", "state", "cache", "maha us, called / graph",
        "cache us, called / graph", "cache / maha",
    ]  # fmt: skip
    table = []
    for row in rows:
        best = row.best_cached()
        cached = "-" if best is None else f"{_us(row.times[best])} ({best})"
        ratio = "-" if best is None else f"{row.times[best].over(row.times[OURS]):.2f} x"
        sizes = [row.entries, format_bytes(row.state_bytes), format_bytes(row.cache_bytes)]
        table.append([row.dtype, row.context, row.streams, *sizes, _us(row.times[OURS]), cached, ratio])
    words = (
        f"One token of one layer: {setting.heads} heads x {setting.width}, {setting.groups} KV groups, backend "
        f"{setting.backend}, {setting.device}; MAHA from its state, the next state included, beside the fastest kernel "
        "of SDPA over a cache; called from Python one after the other, and replayed as a CUDA graph behind a flushed "
        "cache"
    )
    parts = [words, markdown_table(header, table), *_missing(rows)]
    found = [[goal.text, f"{goal.found:.2f}", "met" if goal.met else "MISSED"] for goal in goals]
    if found:
        parts.append(markdown_table(["goal of a token's time", "found", ""], found))
    return "\n\n".join(parts)


def _us(times: StepTimes) -> str:
    replayed = "-" if times.replayed_s is None else f"{1e6 * times.replayed_s:.1f}"
    return f"{1e6 * times.called_s:.1f} / {replayed}"


def _missing(rows: Sequence[DecodeRow]) -> list[str]:
    """A line for everything that did not run, or not as a graph, and where."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        lines = [f"not measured: {name}: {reason}" for name, reason in row.unavailable.items()]
        no_graph = {name: times.not_replayed for name, times in row.times.items() if times.not_replayed}
        lines += [f"no graph: {name}: {reason}" for name, reason in no_graph.items()]
        for line in lines:
            reasons.setdefault(line, []).append(f"{row.context} x {row.streams} {row.dtype}")
    found = [f"- {line} (at {', '.join(at)})" for line, at in reasons.items()]
    return ["\n".join(found)] if found else []
