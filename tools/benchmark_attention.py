#!/usr/bin/env python
"""Time and peak memory of MAHA against torch's causal attention and a sliding window of equal keys, by length.

    python tools/benchmark_attention.py --device cpu
    python tools/benchmark_attention.py --device cpu --dtype fp32 --lengths 4096 8192 --aggregation nash --coupling gram

Forward and backward, from raw q, k, v to every gradient; MAHA with its pyramid, normalisation, rotation and
aggregation, dense attention bare. Medians after a warm-up, in turns. First a gate: where the backend does not agree
with the naive form, no figure is printed. Results go to tools/results/ as Markdown and JSON, every time included.
The goals are those of 8 heads x 64, the default operator without convolution, on a CPU: in that setting, and for the
lengths that were measured, each is printed as met or missed.

exit codes:
  0   measured; every goal that applies is met
  1   the gate is red and nothing was measured, or a goal is missed (the result files are written)
  2   an error that names what to change: options that do not fit, a measuring process that died
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

import torch

from maha_megatron.attention.benchmark import figures, gate, measure
from maha_megatron.attention.benchmark.subjects import DENSE, DTYPES, OURS, SUBJECTS, WINDOW, Setting
from maha_megatron.attention.dispatch import BACKEND_NAMES
from maha_megatron.attention.spec import CHOICES, MahaSpec
from maha_megatron.config.load import config_from_dict
from maha_megatron.config.rules import check_config
from maha_megatron.errors import ConfigError, MahaError
from maha_megatron.scales import RATIOS
from maha_megatron.train.result_files import markdown_table, write_result
from maha_megatron.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
EXIT_RED_GATE, EXIT_MISSED_GOAL, EXIT_USER_ERROR = 1, 1, 2
# keys of a configuration whose option here has another name
OPTION_OF = {
    "model.heads": "--heads",
    "model.kv_groups": "--kv-groups",
    "model.head_width": "--width",
    "data.sequence_tokens": "--lengths",
    "maha.key_map": "--key-map",
    "maha.lse_utility": "--no-lse",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark_attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=tuple(measure.METERS), default="cpu", help="(default %(default)s)")
    lengths = [2**power for power in range(10, 17)]
    add(
        "--lengths", type=int, nargs="+", default=lengths, metavar="ROWS", help="of one document (default: 1 k to 64 k)"
    )
    add("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="(default: both)")
    add("--dense-limit", type=int, default=16384, help="longest length of dense attention (%(default)s)")
    add("--heads", type=int, default=8, help="query heads (%(default)s)")
    add("--kv-groups", type=int, help="default: as many as heads")
    add("--width", type=int, default=64, help="of a head (%(default)s)")
    add("--ratio", type=int, choices=RATIOS, default=4, help="(%(default)s)")
    add("--windows", type=int, nargs="+", default=[], help="default: those of each length")
    add("--downsampling", choices=CHOICES["downsampling"], default="gated", help="(%(default)s)")
    add("--key-map", action="store_true", help="with the learned map of pooled keys")
    add("--queries", choices=CHOICES["queries"], default="full", help="(%(default)s)")
    add("--aggregation", choices=("convex", "nash", "mean"), default="convex", help="(%(default)s)")
    add("--regularizer", choices=CHOICES["regularizer"], default="entropy", help="(%(default)s)")
    add("--coupling", choices=CHOICES["coupling"], default="none", help="(%(default)s)")
    add("--no-lse", action="store_true", help="utilities without the log-sum-exp")
    add("--convolution", action="store_true", help="with the convolution, on every side")
    add("--backend", choices=BACKEND_NAMES, default="eager", help="(%(default)s)")
    add("--threads", type=int, default=0, help="of torch; default: torch's own choice")
    add("--repeats", type=int, default=7, help="timed passes of each (%(default)s)")
    add("--seconds", type=float, default=20.0, help="no new pass of a length begins after these (%(default)s)")
    add("--results", type=Path, default=ROOT / "tools" / "results", help="receives the result files")
    options = parser.parse_args(arguments)
    if options.repeats < 3:
        parser.error("needs --repeats >= 3")
    if options.kv_groups is None:
        options.kv_groups = options.heads
    return options


def check_options(options: argparse.Namespace) -> None:
    """Hold what will be measured at each length against the rules of a configuration; a bounded sight is allowed.

    Raises:
        ConfigError: one line, with the length.
    """
    maha = {"ratio": options.ratio, "windows": options.windows, "full_reach": False, "lse_utility": not options.no_lse}
    same = ("downsampling", "key_map", "queries", "aggregation", "regularizer", "coupling", "convolution")
    maha |= {name: getattr(options, name) for name in same}
    model = {"heads": options.heads, "kv_groups": options.kv_groups, "head_width": options.width}
    for length in sorted(options.lengths):
        try:
            check_config(config_from_dict({"model": model, "maha": maha, "data": {"sequence_tokens": length}}))
        except ConfigError as error:
            text = "; ".join(str(error).splitlines())
            text = re.sub(r"\b(?:model|data|maha)\.\w+", lambda key: _option(key[0]), text)
            raise ConfigError(f"{length} tokens: {text}") from error


def _option(key: str) -> str:
    """What a key of a configuration is called here; a key that no option sets keeps its name."""
    return OPTION_OF.get(key, f"--{key.removeprefix('maha.')}" if key.startswith("maha.") else key)


def setting_of(options: argparse.Namespace) -> Setting:
    """What is measured, without the length and the dtype."""
    operator = MahaSpec(
        ratio=options.ratio,
        windows=(),
        downsampling=options.downsampling,
        key_map=options.key_map,
        queries=options.queries,
        aggregation=options.aggregation,
        regularizer=options.regularizer,
        coupling=options.coupling,
        lse_utility=not options.no_lse,
        convolution=options.convolution,
    )
    return Setting(
        operator=operator,
        heads=options.heads,
        groups=options.kv_groups,
        width=options.width,
        windows=tuple(options.windows),
        backend=options.backend,
        device=options.device,
        threads=options.threads,
    )


def run(options: argparse.Namespace) -> int:
    """Gate, measure, print, write."""
    check_options(options)
    setting = setting_of(options)
    load = os.getloadavg()[0]
    if load > 1:
        _say(f"warning: the load of this machine is {load:.1f}; times will be off")
    verdicts = {}
    for dtype in options.dtype:
        verdict = gate.check(setting, DTYPES[dtype], options.lengths)
        _say(f"{setting.backend} against naive, {dtype}: {'equal' if verdict.green else 'WRONG'} ({verdict})")
        verdicts[dtype] = dataclasses.asdict(verdict)
        if not verdict.green:
            print(f"error: {setting.backend} is wrong in {dtype}, so no speed is shown: {verdict}", file=sys.stderr)
            return EXIT_RED_GATE
    rows, raw = [], []
    for dtype in options.dtype:
        for length in sorted(options.lengths):
            row, times = measured(setting, options, dtype, length)
            rows.append(row)
            raw.append(dataclasses.asdict(row) | {"times_s": times, "windows": setting.spec_at(length).windows})
    goals = figures.goals(setting, rows)
    text = report(setting, rows, goals)
    settings = {"setting": dataclasses.asdict(setting), "load_at_start": load, "torch_threads": torch.get_num_threads()}
    found = {"gate": verdicts, "rows": raw, "goals": [dataclasses.asdict(goal) for goal in goals]}
    paths = write_result(options.results, "benchmark_attention", text=text, data=settings | found)
    print(text, "", *paths, sep="\n")
    return 0 if all(goal.met for goal in goals) else EXIT_MISSED_GOAL


def measured(
    setting: Setting, options: argparse.Namespace, dtype: str, length: int
) -> tuple[figures.Row, dict[str, list[float]]]:
    """One row, and every single time."""
    subjects = [name for name in SUBJECTS if name != DENSE or length <= options.dense_limit]
    times = measure.times_s(setting, subjects, length, dtype, repeats=options.repeats, limit_s=options.seconds)
    peaks = {name: measure.peak_bytes(setting, name, length, dtype) for name in subjects}
    known = {name: peak for name, peak in peaks.items() if peak is not None}
    row = figures.Row(dtype=dtype, rows=length, median_s=measure.medians(times), peak_bytes=known)
    parts = [f"{name} {1e3 * seconds:.0f} ms" for name, seconds in row.median_s.items()]
    _say(f"{dtype} {length:6} tokens: {', '.join(parts)}")
    return row, times


def report(setting: Setting, rows: Sequence[figures.Row], goals: Sequence[figures.Goal]) -> str:
    """The tables as Markdown."""
    heads = f"{setting.heads} heads x {setting.width}, {setting.groups} KV groups"
    how = "forward and backward of one document, medians; peak memory above the inputs"
    operator = ", ".join(
        f"{name} {value}" for name, value in dataclasses.asdict(setting.operator).items()
        if name not in ("windows", "program")
    )  # fmt: skip
    shown = (OURS, WINDOW, DENSE)
    header = ["dtype", "tokens", *(f"{name} ms" for name in shown), "dense / maha", *(f"{name} peak" for name in shown)]
    table = []
    for row in rows:
        speedup = row.speedup()
        ms = [f"{1e3 * row.median_s[name]:.1f}" if name in row.median_s else "-" for name in shown]
        peaks = [format_bytes(row.peak_bytes[name]) if name in row.peak_bytes else "-" for name in shown]
        table.append([row.dtype, row.rows, *ms, "-" if speedup is None else f"{speedup:.2f} x", *peaks])
    parts = [
        f"{heads}; {operator}; backend {setting.backend}, {setting.device}; {how}",
        markdown_table(header, table),
    ]
    grown = [[dtype, length, f"{ratio:.2f} x"] for dtype, length, ratio in figures.growth(rows)]
    if grown:
        parts.append(markdown_table(["dtype", "tokens", "maha: time over that of half the length"], grown))
    found = [[goal.text, f"{goal.found:.2f}", "met" if goal.met else "MISSED"] for goal in goals]
    if found:
        parts.append(markdown_table([f"goal ({figures.GOAL_SETTING_NAME})", "found", ""], found))
    return "\n\n".join(parts)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; turn what users can mend into one line."""
    options = parse_arguments(arguments)
    try:
        return run(options)
    except MahaError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
