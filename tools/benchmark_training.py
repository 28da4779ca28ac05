r"""Train several architectures under the same settings and compare speed, memory and loss.

    python tools/benchmark_training.py --models hybrid maha dense --size 125m --cluster 1gpu --steps 200 \
        --set "data.train=[{prefix: data/corpus_text_document}]" --set data.tokenizer=data/tokenizer.model

Every model runs launch/pretrain.py in a process of its own, on the same data in the same order. Speeds and times are
medians over the steps after the first fifth, in which the warm-up is kept; gradient norms are over all steps, and
"against the first" sets their median against that of the first model with as many tokens a step. A loss that is not a
number ends the benchmark. Results go to tools/results/ as Markdown and JSON, raw rows included.

Three columns judge each model, "met" or "MISSED": its loss falls (the median of the last tenth of the steps is below
that of the first tenth; in fewer than 20 steps, the last below the first), every number of it is finite, and its median
gradient norm is within 3 x of the first model's with as many tokens a step, up or down.

exit codes:
  0   every model ran and meets all three
  1   one of them is missed (the result files are written)
  2   an error that names what to change, or a run that failed

Every aggregation on the quickstart's corpus, 100 steps each (stated programs 5 steps of 64 tokens, beside the mean):

    short="data.sequence_tokens=64 maha.windows=[16,14,4] train.steps=5 train.global_batch_samples=1 \
        train.micro_batch_samples=1"
    program="maha.aggregation=program maha.program=configs.programs.budget:build"
    python tools/benchmark_training.py --size 10m --cluster cpu --steps 100 --timeout-s 3600 --models \
        "maha maha.aggregation=mean" maha "maha maha.lse_utility=false" \
        "maha maha.regularizer=quadratic" "maha maha.coupling=gram" "maha maha.aggregation=nash" \
        "maha maha.aggregation=nash maha.coupling=gram" \
        "maha maha.aggregation=nash maha.coupling=gram maha.regularizer=quadratic" \
        "maha maha.aggregation=mean $short" "maha $program $short" \
        --allow-program configs.programs.budget:build --set data.sequence_tokens=512 --set "maha.windows=[32,28,32]" \
        --set model.vocabulary=4096 --set train.global_batch_samples=8 --set train.micro_batch_samples=4 \
        --set "data.train=[{prefix: runs/quickstart/data/corpus_text_document}]" \
        --set data.tokenizer=runs/quickstart/tokenizer/tokenizer.model
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from maha_megatron.config import programs
from maha_megatron.config.load import load_config
from maha_megatron.errors import ConfigError, MahaError
from maha_megatron.train.result_files import markdown_table, write_result
from maha_megatron.train.trials import Trial, column, run_side_by_side, warmup_settings
from maha_megatron.train.verdicts import VERDICTS, verdicts

ROOT = Path(__file__).resolve().parent.parent
EXIT_MISSED, EXIT_USER_ERROR = 1, 2

HEADER = (
    "model", "tokens/s", "ms a step", "TFLOP/s a device", "MFU %", "peak memory GiB", "loss, first step",
    "loss, last step", "validation loss", "missed solves", "gradient norm, median", "largest", "against the first",
    *VERDICTS,
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["hybrid", "maha", "dense"],
        help='names under configs/model, each with settings of its own if you like: "dense data.document_bounds=false"',
    )  # fmt: skip
    parser.add_argument("--size", default="125m", help="name under configs/size")
    parser.add_argument("--cluster", default="1gpu", help="name under configs/cluster")
    parser.add_argument("--processes", type=int, default=1, help="ranks on this machine")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key in every run")
    parser.add_argument(
        "--at-once", type=int, default=1, help="one-process runs side by side, each on a GPU of its own (default 1)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_training"), help="receives the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "results", help="receives the result files")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="limit of one run")
    parser.add_argument(
        programs.OPTION, metavar="MODULE:FUNCTION", help=f"{programs.OPTION_HELP}; for the models that name it"
    )
    return parser.parse_args()


def step_tokens(rows: list[dict[str, float]]) -> int:
    """Tokens of one step of a run."""
    return next(round(row["tokens_per_s"] * row["step_s"]) for row in rows if "tokens_per_s" in row)


def summary(model: str, rows: list[dict[str, float]], first: list[dict[str, float]]) -> list[object]:
    """One row of the table; `first` are the rows of the run that its gradient norms are set against."""
    logged = [row for row in rows if "tokens_per_s" in row]
    steady = logged[len(logged) // 5 :]
    losses, validation = column(rows, "loss_nats"), column(rows, "validation_loss_nats")
    norms, first_norms = (list(column(some, "gradient_norm").values()) for some in (rows, first))
    missed = column(rows, "missed_solves")
    mfu = [100 * row["mfu_frac"] for row in steady if "mfu_frac" in row]
    return [
        model,
        statistics.median(row["tokens_per_s"] for row in steady),
        1e3 * statistics.median(row["step_s"] for row in steady),
        statistics.median(row["tflops_per_device"] for row in steady),
        statistics.median(mfu) if mfu else "no stated peak",
        max(row["memory_bytes"] for row in steady) / 2**30,
        losses[min(losses)],
        losses[max(losses)],
        validation[max(validation)],
        int(sum(missed.values())) if missed else "no solver",
        statistics.median(norms),
        max(norms),
        statistics.median(norms) / statistics.median(first_norms),
        *("met" if met else "MISSED" for met in verdicts(rows, first).values()),
    ]


def planned(arguments: argparse.Namespace, model: str, *own: str) -> Trial:
    """The run of one model with its own settings, and its config file."""
    name = "_".join([model, *(re.sub(r"[^A-Za-z0-9]+", "-", setting) for setting in own)])
    config = arguments.folder / f"{name}.yaml"
    fragments = [f"model/{model}", f"size/{arguments.size}", f"cluster/{arguments.cluster}"]
    config.write_text(json.dumps({"extends": fragments}), encoding="utf-8")  # JSON is YAML
    given = (f"train.steps={arguments.steps}", *arguments.set, *own)
    steps = int([word for word in given if word.startswith("train.steps=")][-1].partition("=")[2])
    configured = load_config(config, [word for word in given if not word.startswith("train.steps=")])
    warmup = warmup_settings(configured.schedule.warmup_steps, steps, given)
    settings = (*given, "train.log_interval_steps=1", *warmup)
    allowed = arguments.allow_program if programs.states_program(configured) else None
    programs.allowed_program(configured, allowed)
    return Trial(name=name, config=config, settings=settings, processes=arguments.processes, allow_program=allowed)


def main() -> int:
    """Run every model, print and write the table; the exit code."""
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    trials = [planned(arguments, *model.split()) for model in arguments.models]
    if arguments.allow_program and not any(trial.allow_program for trial in trials):
        raise ConfigError(f"{programs.OPTION}: no effect, since no model has maha.aggregation: program; remove it")
    script, limit = ROOT / "launch" / "pretrain.py", arguments.timeout_s
    at_once = arguments.at_once
    results = run_side_by_side(
        trials, arguments.folder, script, at_once=at_once, timeout_s=limit, device_each=at_once > 1
    )
    table, raw, firsts = [], {}, {}
    for model, trial, rows in zip(arguments.models, trials, results, strict=True):
        raw[trial.name] = {"config": json.loads(trial.config.read_text()), "settings": trial.settings, "rows": rows}
        table.append(summary(model, rows, firsts.setdefault(step_tokens(rows), rows)))
        print(markdown_table(HEADER, table[-1:]).splitlines()[-1], flush=True)
    text = markdown_table(HEADER, table)
    text += f"\n\nSize {arguments.size}, {arguments.steps} steps, settings: " + " ".join(arguments.set)
    paths = write_result(arguments.results, "benchmark_training", text=text, data={"runs": raw})
    print(text, *paths, sep="\n")
    return EXIT_MISSED if any("MISSED" in row for row in table) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MahaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
