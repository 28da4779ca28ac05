"""The GPU benchmark of attention as tables and as a plot of time against length."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from maha_megatron.attention.benchmark.cases import DEFAULT, GENERAL
from maha_megatron.attention.benchmark.figures import Goal
from maha_megatron.attention.benchmark.kernel_figures import BOTH, FORWARD, GOAL_SETTING_NAME, PARTS, KernelRow
from maha_megatron.attention.benchmark.subjects import OURS
from maha_megatron.attention.benchmark.work import Card
from maha_megatron.train.result_files import markdown_table
from maha_megatron.units import format_bytes


def report(rows: Sequence[KernelRow], goals: Sequence[Goal], card: Card | None) -> str:
    """Every table as Markdown, case by case, then the goals."""
    parts = []
    if card is not None:
        parts.append(
            f"This card: {card.bytes_per_s / 1e12:.2f} TB/s copied (read and written), {card.flops_per_s / 1e12:.0f} "
            "TFLOP/s in products of bf16."
        )
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        parts.append(f"## {case}\n\n{_setting_in_words(of_case[0])}")
        parts += [_ratio_table(of_case)] if case == GENERAL else [_time_table(of_case), _work_table(of_case)]
        parts += _unavailable(of_case)
    if goals:
        found = [[goal.text, f"{goal.found:.2f}", "met" if goal.met else "MISSED"] for goal in goals]
        parts.append("## Goals\n\n" + markdown_table([f"goal ({GOAL_SETTING_NAME})", "found", ""], found))
    return "\n\n".join(part for part in parts if part)


def _setting_in_words(row: KernelRow) -> str:
    setting = row.setting
    documents = "documents of mixed length, at most" if setting.mixed else "documents of"
    return (
        f"{setting.heads} heads x {setting.width}, {setting.groups} KV groups, backend {setting.backend}, "
        f"{max(setting.call_rows, 1)} rows a call or one document, {documents} the length of each line; medians of ms "
        "a call, forward / backward / both; kept and peak: bytes above the inputs, forward's output included"
    )


def _subjects(rows: Sequence[KernelRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.median_s))


def _ms(row: KernelRow, name: str) -> str:
    if name not in row.median_s:
        return "-"
    return " / ".join(f"{1e3 * row.median_s[name][part]:.3f}" for part in PARTS)


def _time_table(rows: Sequence[KernelRow]) -> str:
    """Times, speed-ups against the best dense kernel of each part, memory."""
    names = _subjects(rows)
    header = [
        "dtype",
        "tokens",
        *names,
        f"{FORWARD}, x dense",
        f"{BOTH}, x dense",
        "kept",
        "x dense",
        "peak",
        "x dense",
    ]
    table = []
    for row in rows:
        speedups = [_speedup(row, part) for part in (FORWARD, BOTH)]
        table.append([row.dtype, row.length, *(_ms(row, name) for name in names), *speedups, *_memory(row)])
    return markdown_table(header, table)


def _speedup(row: KernelRow, part: str) -> str:
    speedup = row.speedup(part)
    return "-" if speedup is None else f"{speedup:.2f} ({row.best_dense(part)})"


def _memory(row: KernelRow) -> list[str]:
    cells = []
    for field in ("kept_bytes", "peak_bytes"):
        ratio = row.memory_ratio(field)
        cells.append(format_bytes(getattr(row.memory[OURS], field)) if OURS in row.memory else "-")
        cells.append("-" if ratio is None else f"{ratio:.2f}")
    return cells


def _work_table(rows: Sequence[KernelRow]) -> str:
    """What the operator's kernels execute, at which rate, and how near they are to their floor."""
    header = [
        "dtype", "tokens", "keys seen a row", "keys loaded a row", "forward TFLOP/s, seen (loaded)", "forward GB/s",
        "backward TFLOP/s, seen (loaded)", "backward GB/s", "floor ms, forward / backward", "floor / found",
    ]  # fmt: skip
    table = []
    for row in rows:
        if row.work is None:
            continue
        work, masked = row.work, row.work.loaded_keys / row.work.visible_keys
        line = [row.dtype, row.length, f"{work.visible_keys:.0f}", f"{work.loaded_keys:.0f}"]
        floors = work.forward_floor_s, work.backward_floor_s
        both = (work.forward_flops, work.forward_bytes), (work.backward_flops, work.backward_bytes)
        seconds = [row.median_s[OURS][part] for part in PARTS[:2]]
        for (flops, moved), taken in zip(both, seconds, strict=True):
            rate = flops / taken / 1e12
            line += [f"{rate:.0f} ({rate * masked:.0f})", f"{moved / taken / 1e9:.0f}"]
        line.append(" / ".join(f"{1e3 * floor:.3f}" for floor in floors))
        line.append(" / ".join(f"{floor / taken:.2f}" for floor, taken in zip(floors, seconds, strict=True)))
        table.append(line)
    return markdown_table(header, table) if table else ""


def _ratio_table(rows: Sequence[KernelRow]) -> str:
    """General operators against the default one."""
    header = ["dtype", "tokens", "operator", "ms", *(f"{part}, x {DEFAULT}" for part in PARTS)]
    table = []
    for row in rows:
        for name in row.median_s:
            ratios = [f"{1 / row.against(name, DEFAULT, part):.2f}" for part in PARTS]
            table.append([row.dtype, row.length, name, _ms(row, name), *ratios])
    return markdown_table(header, table)


def _unavailable(rows: Sequence[KernelRow]) -> list[str]:
    """A line for every subject that did not run, with the lengths."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.unavailable.items():
            reasons.setdefault((name, reason), []).append(f"{row.length} {row.dtype}")
    lines = [f"- not measured: {name} at {', '.join(at)}: {reason}" for (name, reason), at in reasons.items()]
    return ["\n".join(lines)] if lines else []


def plot(rows: Sequence[KernelRow]) -> Figure:
    """Milliseconds against length, both logarithmic: a line a subject, a row of panels a case."""
    cases = list(dict.fromkeys((row.case, row.dtype) for row in rows))
    figure = Figure(figsize=(11, 3.6 * len(cases)), dpi=120, layout="constrained")  # without pyplot: no global state
    panels = figure.subplots(len(cases), 2, squeeze=False)
    for (case, dtype), axes in zip(cases, panels, strict=True):
        of_case = [row for row in rows if (row.case, row.dtype) == (case, dtype)]
        for part, panel in zip((FORWARD, BOTH), axes, strict=True):
            for name in _subjects(of_case):
                points = [(row.length, 1e3 * row.median_s[name][part]) for row in of_case if name in row.median_s]
                panel.plot(*zip(*points, strict=True), "o-", label=name, markersize=3, lw=2 if name == OURS else 1)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set(xlabel="document, tokens", ylabel="ms a call", title=f"{case}, {dtype}: {part}")
            panel.grid(alpha=0.3, which="both")
            panel.legend(fontsize=7)
    return figure
