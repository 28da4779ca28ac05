#!/usr/bin/env python
"""Time and peak memory of MAHA against torch's causal attention and a sliding window of equal keys, by length.

    python tools/benchmark_attention.py --device cpu
    python tools/benchmark_attention.py --device cpu --dtype fp32 --lengths 4096 8192 --aggregation nash --coupling gram
    python tools/benchmark_attention.py --device cuda --preset
    python tools/benchmark_attention.py --device cuda --lengths 4096 --kv-groups 8 --flex
    python tools/benchmark_attention.py --device cuda --decode

Forward and backward, from raw q, k, v to every gradient; MAHA with its pyramid, normalisation, rotation and
aggregation, dense attention bare. Medians after a warm-up, in turns. First a gate: where the backend does not agree
with the naive form, no figure is printed. Results go to tools/results/ as Markdown and JSON, every time included.

On a CPU, one document a call, in processes of their own. The goals are those of 8 heads x 64, the default operator
without convolution: in that setting, and for the lengths that were measured, each is printed as met or missed.

On a GPU, calls of 32 k rows (longer documents: one a call), events of the device with the cache flushed before every
pass, random numbers: MAHA beside cuDNN and FlashAttention 2, each forced, and sliding windows that load as many keys.
--preset runs the cases kv16, kv8, d64, packed and general, or those that are named (maha_megatron/attention/benchmark/
cases.py); without it, the options say the case. Memory, rates, loaded keys and the floor are in the tables; a plot is
beside them. The goals are those of kv16 and general in bf16. Kernels are compiled ahead by --processes.

--decode times one token of one layer instead: MAHA from the state of a context, beside SDPA over a cache of keys and
values, for --streams streams at contexts of --lengths tokens. The goals, on a GPU, are that one stream at 512 k takes
at most 1.2 x the time at 4 k, and that several grow by at most 1.2 x of what a state's entries grow.

exit codes:
  0   measured; every goal that applies is met
  1   the gate is red and nothing was measured, or a goal is missed (the result files are written)
  2   an error that names what to change: options that do not fit, a measuring process that died
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

import torch

from maha_megatron.attention.benchmark import cases, decode, figures, gate, kernel_figures, measure
from maha_megatron.attention.benchmark.ahead import check_and_compile
from maha_megatron.attention.benchmark.measure_kernels import measured as measured_kernels
from maha_megatron.attention.benchmark.step_clock import CudaStepClock, HostStepClock
from maha_megatron.attention.benchmark.subjects import DENSE, DTYPES, OURS, SUBJECTS, WINDOW, Setting
from maha_megatron.attention.benchmark.turns import CudaClock
from maha_megatron.attention.dispatch import BACKEND_NAMES
from maha_megatron.attention.spec import CHOICES, MahaSpec
from maha_megatron.config.load import config_from_dict
from maha_megatron.config.rules import check_config
from maha_megatron.errors import ConfigError, exit_code_of
from maha_megatron.scales import RATIOS
from maha_megatron.train import decode_report, kernel_report
from maha_megatron.train.result_files import markdown_table, write_result
from maha_megatron.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
EXIT_RED_GATE, EXIT_MISSED_GOAL = 1, 1
# keys of a configuration whose option here has another name
OPTION_OF = {
    "model.heads": "--heads",
    "model.kv_groups": "--kv-groups",
    "model.head_width": "--width",
    "data.sequence_tokens": "--lengths",
    "maha.lse_utility": "--no-lse",
}


# what an option is where it is not given
DEFAULTS = {
    "cpu": {
        "lengths": [2**power for power in range(10, 17)], "dtype": ["fp32", "bf16"], "heads": 8, "width": 64,
        "backend": "eager", "repeats": 7, "seconds": 20.0, "dense_limit": 16384, "threads": 0,
    },
    "cuda": {
        "lengths": list(cases.LENGTHS), "dtype": ["bf16"], "heads": 16, "width": 128,
        "backend": "triton", "repeats": 20, "seconds": 0.5, "processes": min(max((os.cpu_count() or 1) - 2, 1), 14),
    },
}  # fmt: skip
DECODE_DEFAULTS = {"lengths": list(decode.CONTEXTS), "streams": list(decode.STREAMS)}
NOT_OF_DECODE = ("preset", "flex", "processes", "seconds")
OF_ONE_DEVICE = {"cpu": ("dense_limit", "threads"), "cuda": ("preset", "flex", "processes")}
# what a preset says itself; its lengths, dtypes and backend may be others
SAID_BY_PRESETS = (
    "heads", "kv_groups", "width", "ratio", "windows", "downsampling", "key_map", "queries", "aggregation",
    "regularizer", "coupling", "no_lse", "convolution", "rope_unit",
)  # fmt: skip


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark_attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=tuple(DEFAULTS), default="cpu", help="(default %(default)s)")
    add("--preset", nargs="*", choices=cases.CASES, help="GPU: cases to measure; without names all of them")
    add("--decode", action="store_true", help="measure one token, from a state and from a cache")
    add("--streams", type=int, nargs="+", metavar="B", help="with --decode: sequences at once (default 1 and 32)")
    add("--lengths", type=int, nargs="+", metavar="ROWS", help="of a document (default: powers of 2 from 1 k, to 64 k "
        "on a CPU and 128 k on a GPU; for general 4 k and 32 k; with --decode 4 k, 64 k and 512 k)")  # fmt: skip
    add("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), help="(default: fp32 and bf16; GPU: bf16)")
    add("--dense-limit", type=int, help="CPU: longest length of dense attention (default 16384)")
    add("--heads", type=int, help="query heads (default 8; GPU: 16)")
    add("--kv-groups", type=int, help="default: as many as heads")
    add("--width", type=int, help="of a head (default 64; GPU: 128)")
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
    add("--rope-unit", choices=CHOICES["rope_unit"], default="block", help="of MAHA's positions (%(default)s)")
    add("--flex", action="store_true", help="GPU: FlexAttention beside the others; torch.compile takes its time")
    add("--backend", choices=BACKEND_NAMES, help="(default eager; GPU: triton)")
    add("--threads", type=int, help="CPU: of torch; default: torch's own choice")
    add("--processes", type=int, help="GPU: that compile kernels ahead (default: all cores but 2, at most 14; 0: none)")
    add("--repeats", type=int, help="timed passes of each (default 7; GPU: 20)")
    add("--seconds", type=float, help="no new pass of a length begins after these (default 20; GPU: 0.5)")
    add("--results", type=Path, default=ROOT / "tools" / "results", help="receives the result files")
    options = parser.parse_args(arguments)
    _refuse_what_is_not_read(parser, options)
    defaults = DEFAULTS[options.device] | (DECODE_DEFAULTS if options.decode else {})
    for name, value in defaults.items():
        if getattr(options, name) is None and not (name == "lengths" and options.preset is not None):
            setattr(options, name, value)
    if options.repeats < 3:
        parser.error("needs --repeats >= 3")
    if options.kv_groups is None:
        options.kv_groups = options.heads
    return options


def _refuse_what_is_not_read(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error at an option that would have no effect."""
    for device, names in OF_ONE_DEVICE.items():
        for name in names:
            if device != options.device and getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} has no effect with --device {options.device}; remove it")
    if options.streams and not options.decode:
        parser.error("--streams has no effect without --decode; remove it")
    without = [name for name in NOT_OF_DECODE if options.decode and getattr(options, name) != parser.get_default(name)]
    if without:
        parser.error(f"--{without[0]} has no effect with --decode; remove it")
    given = [name for name in SAID_BY_PRESETS if getattr(options, name) != parser.get_default(name)]
    if options.preset is not None and given:
        parser.error(f"--preset says --{given[0].replace('_', '-')} itself; remove one of the two")


def check_options(options: argparse.Namespace) -> None:
    """Hold what will be measured at each length against the rules of a configuration; a bounded sight is allowed.

    Raises:
        ConfigError: one line, with the length.
    """
    maha = {"ratio": options.ratio, "windows": options.windows, "full_reach": False, "lse_utility": not options.no_lse}
    same = ("downsampling", "key_map", "queries", "aggregation", "regularizer", "coupling", "convolution", "rope_unit")
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
    own = f"--{key.removeprefix('maha.').replace('_', '-')}" if key.startswith("maha.") else key
    return OPTION_OF.get(key, own)


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
        rope_unit=options.rope_unit,
    )
    return Setting(
        operator=operator,
        heads=options.heads,
        groups=options.kv_groups,
        width=options.width,
        windows=tuple(options.windows),
        backend=options.backend,
        device=options.device,
        threads=options.threads or 0,
        call_rows=cases.CALL_ROWS if options.device == "cuda" else 0,
    )


def run(options: argparse.Namespace) -> int:
    """Gate, measure, print, write, on a CPU."""
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


def cases_of(options: argparse.Namespace) -> list[cases.Case]:
    """What is measured on a GPU."""
    if options.preset is None:
        check_options(options)
        return [cases.case_of(setting_of(options), "options", options.lengths, options.flex)]
    names = options.preset or cases.CASES
    return [cases.preset_case(name, options.lengths or (), options.backend, options.flex) for name in names]


def run_kernels(options: argparse.Namespace) -> int:
    """Gate, compile, measure, print, write, on a GPU."""
    clock, wanted = CudaClock(), cases_of(options)
    verdicts = check_and_compile(wanted, options.dtype, options.processes)
    for words, verdict in verdicts.items():
        _say(f"{options.backend} against naive, {words}: {'equal' if verdict.green else 'WRONG'} ({verdict})")
    wrong = {words: verdict for words, verdict in verdicts.items() if not verdict.green}
    for words, verdict in wrong.items():
        print(f"error: {options.backend} is wrong, so no speed is shown: {words}: {verdict}", file=sys.stderr)
    if wrong:
        return EXIT_RED_GATE
    card, rows, raw = clock.card(), [], []
    for case in wanted:
        for dtype in options.dtype:
            for length in case.lengths:
                row, times = measured_kernels(
                    case, length, dtype, clock, card, turns=options.repeats, limit_s=options.seconds
                )
                rows.append(row)
                raw.append(dataclasses.asdict(row) | {"times": times})
                parts = [f"{name} {1e3 * taken[kernel_figures.BOTH]:.2f} ms" for name, taken in row.median_s.items()]
                _say(f"{case.name} {dtype} {length:6} tokens: {', '.join(parts)}")
    goals = kernel_figures.goals(rows)
    text = kernel_report.report(rows, goals, card)
    found = {
        "card": dataclasses.asdict(card),
        "gate": {words: dataclasses.asdict(verdict) for words, verdict in verdicts.items()},
        "rows": raw,
        "goals": [dataclasses.asdict(goal) for goal in goals],
    }
    plot = kernel_report.plot(rows)
    paths = write_result(options.results, "benchmark_attention", text=text, data=found, plot=plot)
    print(text, "", *paths, sep="\n")
    return 0 if all(goal.met for goal in goals) else EXIT_MISSED_GOAL


def run_decode(options: argparse.Namespace) -> int:
    """Gate, measure, print, write: one token."""
    check_options(options)
    setting, on_gpu = setting_of(options), options.device == "cuda"
    clock = CudaStepClock() if on_gpu else HostStepClock()
    verdicts = {dtype: decode.check_step(setting, DTYPES[dtype], min(options.lengths)) for dtype in options.dtype}
    for dtype, verdict in verdicts.items():
        _say(f"{setting.backend} against naive, a token, {dtype}: {'equal' if verdict.green else 'WRONG'} ({verdict})")
        if not verdict.green:
            print(f"error: {setting.backend} is wrong in {dtype}, so no speed is shown: {verdict}", file=sys.stderr)
            return EXIT_RED_GATE
    rows = []
    for dtype in options.dtype:
        for streams in options.streams:
            for context in sorted(options.lengths):
                cache = on_gpu or context <= options.dense_limit
                rows.append(
                    decode.measured(setting, context, streams, dtype, clock, repeats=options.repeats, cache=cache)
                )
                parts = [f"{name} {1e6 * times.best_s:.0f} us" for name, times in rows[-1].times.items()]
                _say(f"{dtype} {streams} streams, {context} tokens: {', '.join(parts)}")
    goals = decode.goals(setting, rows)
    text = decode_report.report(setting, rows, goals)
    found = {"setting": setting, "rows": rows, "goals": goals, "gate": verdicts}
    data = json.loads(json.dumps(found, default=dataclasses.asdict))
    paths = write_result(options.results, "benchmark_attention_decode", text=text, data=data)
    print(text, "", *paths, sep="\n")
    return 0 if all(goal.met for goal in goals) else EXIT_MISSED_GOAL


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; turn what users can mend into one line."""
    options = parse_arguments(arguments)
    measure = run_decode if options.decode else run_kernels if options.device == "cuda" else run
    return exit_code_of(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
