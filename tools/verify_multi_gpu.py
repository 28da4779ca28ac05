r"""Show that every topology of two devices trains like one: losses over a run and the first gradient norm.

    python tools/verify_multi_gpu.py --config configs/run/example_125m.yaml --steps 50 \
        --set "data.train=[{prefix: data/corpus_text_document}]" --set data.tokenizer=data/tokenizer.model

The warm-up is kept within the first fifth of the steps.

The yardstick is one device against itself: the same run with the micro-batch whole, in halves and in quarters. A
topology passes when its losses stay within twice the largest difference of any two of these three, at every logged
step, and its first gradient norm within twice their largest difference or the stated floor. The data-parallel
topologies take half the micro-batch a device. Works on CPUs too (gloo). Exit code 1 when a topology fails.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from maha_megatron.config import programs
from maha_megatron.config.load import load_config
from maha_megatron.errors import MahaError
from maha_megatron.train.result_files import markdown_table, write_result
from maha_megatron.train.trials import Trial, column, run_side_by_side, warmup_settings

ROOT = Path(__file__).resolve().parent.parent

ONE, HALVES, QUARTERS = "1 device", "1 device, half micro-batch", "1 device, quarter micro-batch"
YARDSTICK = (ONE, HALVES, QUARTERS)
HEADER = (
    "topology", "largest loss difference", "against the bound", "first gradient norm", "relative difference", "verdict"
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a run file")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each run")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key in every run")
    parser.add_argument(
        "--norm-floor", type=float, default=1e-3,
        help="relative difference of the first gradient norm that bf16 rounding alone explains (default 1e-3)",
    )  # fmt: skip
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="TOPOLOGY", help="topologies to leave out, by title"
    )
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the devices (default 1)")
    parser.add_argument("--folder", type=Path, default=Path("runs/verify_multi_gpu"), help="receives the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "results", help="receives the result files")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="limit of one run (default 600)")
    parser.add_argument(programs.OPTION, metavar="MODULE:FUNCTION", help=programs.OPTION_HELP)
    return parser.parse_args()


def trials(arguments: argparse.Namespace) -> dict[str, Trial]:
    """The runs by title: those on one device, then every topology of two."""
    config = load_config(arguments.config, arguments.set)
    allowed = programs.allowed_program(config, arguments.allow_program)
    micro = config.train.micro_batch_samples
    if micro % 4:
        raise MahaError(f"train.micro_batch_samples is {micro}; set a multiple of 4, since the yardstick quarters it")
    warmup = warmup_settings(config.schedule.warmup_steps, arguments.steps, arguments.set)
    common = (f"train.steps={arguments.steps}", "train.log_interval_steps=1", *warmup, *arguments.set)
    half = f"train.micro_batch_samples={micro // 2}"
    topologies = {
        QUARTERS: (1, (f"train.micro_batch_samples={micro // 4}",)),  # first: it takes longest
        HALVES: (1, (half,)),
        ONE: (1, ()),
        "TP2": (2, ("parallel.tensor=2",)),
        "TP2 + sequence parallel": (2, ("parallel.tensor=2", "parallel.sequence=true")),
        "DP2, ZeRO 1": (2, ("zero.stage=1", half)),
        "DP2, ZeRO 2": (2, ("zero.stage=2", half)),
        "DP2, ZeRO 3": (2, ("zero.stage=3", half)),
    }
    choice = [title for title in topologies if title not in YARDSTICK]
    unknown = set(arguments.without).difference(choice)
    if unknown:
        raise MahaError(f"--without {', '.join(sorted(unknown))}: the topologies are {', '.join(choice)}")
    return {
        title: Trial(
            name="".join(letter if letter.isalnum() else "_" for letter in title.lower()),
            config=arguments.config,
            settings=common + extra,
            processes=processes,
            allow_program=allowed,
        )
        for title, (processes, extra) in topologies.items()
        if title not in arguments.without
    }


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    """Largest difference of two loss curves, which must have the same steps."""
    if a.keys() != b.keys():
        raise MahaError(f"two runs logged different steps: {sorted(a)} and {sorted(b)}")
    return max(abs(a[step] - b[step]) for step in a)


def main() -> int:
    """Run everything, print and write the table."""
    arguments = parse_arguments()
    planned = trials(arguments)
    script, at_once = ROOT / "launch" / "pretrain.py", arguments.at_once
    results = run_side_by_side(
        list(planned.values()), arguments.folder, script, at_once=at_once, timeout_s=arguments.timeout_s
    )
    rows = {}
    for title, found in zip(planned, results, strict=True):
        print(f"done: {title}", flush=True)
        rows[title] = found
    losses = {title: column(found, "loss_nats") for title, found in rows.items()}
    norms = {title: column(found, "gradient_norm")[1] for title, found in rows.items()}
    pairs = list(itertools.combinations(YARDSTICK, 2))
    noise = max(largest_difference(losses[a], losses[b]) for a, b in pairs)
    norm_bound = max(*(2 * abs(norms[a] / norms[b] - 1) for a, b in pairs), arguments.norm_floor)
    table, failed = [], False
    for title in rows:
        difference = largest_difference(losses[ONE], losses[title])
        relative = abs(norms[title] / norms[ONE] - 1)
        good = difference <= 2 * noise and relative <= norm_bound
        failed |= not good
        ratio = difference / (2 * noise) if noise else float(difference > 0)
        table.append([title, f"{difference:.2e}", f"{ratio:.2f}", f"{norms[title]:.6f}", f"{relative:.1e}",
                      "same" if good else "DIFFERS"])  # fmt: skip
    text = markdown_table(HEADER, table)
    text += f"\n\n{arguments.steps} steps; bound on the loss 2 x {noise:.2e} nats, on the norm {norm_bound:.1e}."
    paths = write_result(arguments.results, "verify_multi_gpu", text=text, data={"runs": rows})
    print(text, *paths, sep="\n")
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MahaError as error:
        sys.exit(f"{type(error).__name__}: {error}")
