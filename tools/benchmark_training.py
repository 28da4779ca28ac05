r"""Train several architectures under the same settings and compare speed, memory and loss.

    python tools/benchmark_training.py --models hybrid maha dense --size 125m --cluster 1gpu --steps 200 \
        --set "data.train=[{prefix: data/corpus_text_document}]" --set data.tokenizer=data/tokenizer.model

Every model runs launch/pretrain.py in a process of its own, on the same data in the same order. Speeds and times are
medians over the steps after the first fifth, in which the warm-up is kept; gradient norms are over all steps, and
"against the first" sets their median against that of the first model with as many tokens a step. A loss that is not a
number ends the benchmark. Results go to tools/results/ as Markdown and JSON, raw rows included.

With --lengths every model runs at each of them, in micro-batches of --call-tokens, one a step; plain windows (model/
window, window_hybrid) get as many keys as MAHA's default windows have at the length. A second table sets speeds side by
side. A ratio against dense is in it only with --calibrate, which also times transformers' LlamaForCausalLM (SDPA,
torch.compile, same shape and steps), and only where ours reaches 0.9 of it. --profile adds a table of kernels for every
model, and attention's share of the device's time, of three further steps with random tokens.

    python tools/benchmark_training.py --models dense maha hybrid window_hybrid --size 350m --steps 30 --calibrate \
        --lengths 4096 --profile --set train.compile=true --set train.recompute=none --set data.document_bounds=false \
        --set "data.train=[{prefix: data/corpus_text_document}]" --set data.tokenizer=data/tokenizer.model

Three columns judge each model, "met" or "MISSED": its loss falls (the median of the last tenth of the steps is below
that of the first tenth; in fewer than 20 steps, the last below the first), every number of it is finite, and its median
gradient norm is within 3 x of the first model's with as many tokens a step, up or down.

exit codes:
  0   every model ran and meets all three
  1   one of them is missed, or the calibration is (the result files are written)
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from maha_megatron.config import programs
from maha_megatron.config.load import load_config
from maha_megatron.config.schema import Config
from maha_megatron.errors import EXIT_USER_ERROR, ConfigError, MahaError
from maha_megatron.scales import default_windows
from maha_megatron.train import llama_peer, speed_report
from maha_megatron.train.apart import in_a_process
from maha_megatron.train.result_files import markdown_table, write_result
from maha_megatron.train.speed_report import DENSE, Speed
from maha_megatron.train.step_profile import profile_step
from maha_megatron.train.trials import Trial, column, run_side_by_side, warmup_settings
from maha_megatron.train.verdicts import VERDICTS, verdicts

ROOT = Path(__file__).resolve().parent.parent
EXIT_MISSED = 1
LOGGED_ROWS = 6  # of a run with --lengths, at least

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
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[], metavar="TOKENS", help="of a sample; default: the models' own"
    )
    parser.add_argument(
        "--call-tokens", type=int, default=32768, help="with --lengths: of a micro-batch and step (default 32768)"
    )
    parser.add_argument(
        "--calibrate", nargs="?", const=DENSE, metavar="MODEL", help=f"set MODEL (default {DENSE}) against Llama"
    )
    parser.add_argument("--profile", action="store_true", help="a table of kernels for every model and length")
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
    arguments = parser.parse_args()
    if arguments.calibrate and arguments.calibrate not in arguments.models:
        parser.error(f"--calibrate {arguments.calibrate}: --models has no such model; add it")
    if arguments.lengths and any("data.sequence_tokens" in word for word in (*arguments.set, *arguments.models)):
        parser.error("--lengths says data.sequence_tokens; remove one of the two")
    if arguments.call_tokens != parser.get_default("call_tokens") and not arguments.lengths:
        parser.error("--call-tokens has no effect without --lengths")
    return arguments


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


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of the tables: its model, as --models has it, at a length, and the trial with its configuration."""

    model: str
    length: int
    trial: Trial
    config: Config

    @property
    def label(self) -> str:
        return f"{self.model} data.sequence_tokens={self.length}"


def at_length(arguments: argparse.Namespace, config: Config, length: int) -> tuple[str, ...]:
    """Settings that make a model's run one of samples of `length` tokens; those of the command line win."""
    samples = max(arguments.call_tokens // length, 1)
    settings = {
        "data.sequence_tokens": length,
        "train.micro_batch_samples": samples,
        "train.global_batch_samples": samples * arguments.processes,
        "train.validation_samples": samples * arguments.processes,
        # rows of several steps: the weights of the scales are measured in the last of them only
        "train.log_interval_steps": max(arguments.steps // LOGGED_ROWS, 1),
    }
    if len(config.maha.windows) == 1 and not config.maha.full_reach:
        settings["maha.windows"] = f"[{sum(default_windows(length))}]"
    given = {word.partition("=")[0] for word in arguments.set}
    return tuple(f"{key}={value}" for key, value in settings.items() if key not in given)


def planned(arguments: argparse.Namespace, model: str, length: int | None = None) -> Run:
    """The run of one model with its own settings, at a length of its own or at another one."""
    name, *own = model.split()
    file = "_".join(
        [name, *(re.sub(r"[^A-Za-z0-9]+", "-", setting) for setting in own), *([str(length)] * bool(length))]
    )
    path = arguments.folder / f"{file}.yaml"
    fragments = [f"model/{name}", f"size/{arguments.size}", f"cluster/{arguments.cluster}"]
    path.write_text(json.dumps({"extends": fragments}), encoding="utf-8")  # JSON is YAML
    at = () if length is None else at_length(arguments, load_config(path, ()), length)
    given = (f"train.steps={arguments.steps}", *at, *arguments.set, *own)
    steps = int([word for word in given if word.startswith("train.steps=")][-1].partition("=")[2])
    configured = load_config(path, [word for word in given if not word.startswith("train.steps=")])
    warmup = warmup_settings(configured.schedule.warmup_steps, steps, given)
    interval = () if length else ("train.log_interval_steps=1",)
    settings = (*given, *interval, *warmup)
    allowed = arguments.allow_program if programs.states_program(configured) else None
    programs.allowed_program(configured, allowed)
    trial = Trial(name=file, config=path, settings=settings, processes=arguments.processes, allow_program=allowed)
    config = load_config(path, settings)
    return Run(model=model, length=config.data.sequence_tokens, trial=trial, config=config)


def plan(arguments: argparse.Namespace) -> list[Run]:
    """Every run, or one line of why it cannot be made."""
    runs = [planned(arguments, model, at) for at in arguments.lengths or [None] for model in arguments.models]
    if arguments.allow_program and not any(run.trial.allow_program for run in runs):
        raise ConfigError(f"{programs.OPTION}: no effect, since no model has maha.aggregation: program; remove it")
    if arguments.calibrate:
        for run in runs:
            llama_peer.check_comparable(run.config, arguments.processes)
    if arguments.profile and (arguments.processes > 1 or any(run.trial.allow_program for run in runs)):
        raise ConfigError("--profile is for one process and for models without a stated program; remove it")
    return runs


def llama_speeds(runs: Sequence[Run], model: str, steps: int) -> dict[int, float]:
    """Tokens a second of Llama in the shape of `model`, by length; the first fifth of the steps is left out."""
    found = {}
    for run in runs:
        if run.model == model:
            taken = in_a_process(llama_peer.llama_step_s, run.config, steps)
            tokens = run.config.train.global_batch_samples * run.length
            found[run.length] = tokens / statistics.median(taken[max(len(taken) // 5, 1) :])
            print(f"LlamaForCausalLM, {run.length} tokens: {found[run.length]:.0f} tokens/s", flush=True)
    return found


def speed_text(arguments: argparse.Namespace, runs: Sequence[Run], speeds: Sequence[Speed], raw: dict) -> str:
    """Calibration, speeds side by side and profiles, as Markdown; their data goes into `raw`."""
    calibration, parts = None, []
    if arguments.calibrate:
        llama = llama_speeds(runs, arguments.calibrate, arguments.steps)
        calibration = speed_report.calibrated(speeds, arguments.calibrate, llama)
        raw["llama_tokens_per_s"] = llama
        parts.append("## Calibration\n\n" + speed_report.calibration_text(calibration))
    profiles = {}
    for run in runs if arguments.profile else ():
        profiles[run.model, run.length] = in_a_process(profile_step, run.config)
    raw["profiles"] = {f"{model} {length}": asdict(found) for (model, length), found in profiles.items()}
    parts.append("## Speed\n\n" + speed_report.speed_table(speeds, calibration, profiles))
    parts += [speed_report.profile_text(*key, found) for key, found in profiles.items()]
    return "\n\n".join(parts)


def main() -> int:
    """Run every model, print and write the tables; the exit code."""
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs = plan(arguments)
    script, limit = ROOT / "launch" / "pretrain.py", arguments.timeout_s
    at_once = arguments.at_once
    trials = [run.trial for run in runs]
    results = run_side_by_side(
        trials, arguments.folder, script, at_once=at_once, timeout_s=limit, device_each=at_once > 1
    )
    table, raw, speeds, firsts = [], {}, [], {}
    for run, rows in zip(runs, results, strict=True):
        trial = run.trial
        raw[trial.name] = {"config": json.loads(trial.config.read_text()), "settings": trial.settings, "rows": rows}
        label = run.label if arguments.lengths else run.model
        table.append(summary(label, rows, firsts.setdefault(step_tokens(rows), rows)))
        speeds.append(Speed(model=run.model, length=run.length, tokens_per_s=table[-1][1]))
        print(markdown_table(HEADER, table[-1:]).splitlines()[-1], flush=True)
    text, data = markdown_table(HEADER, table), {"runs": raw}
    if arguments.lengths or arguments.calibrate or arguments.profile:
        text += "\n\n" + speed_text(arguments, runs, speeds, data)
    text += f"\n\nSize {arguments.size}, {arguments.steps} steps, settings: " + " ".join(arguments.set)
    paths = write_result(arguments.results, "benchmark_training", text=text, data=data)
    print(text, *paths, sep="\n")
    return EXIT_MISSED if "MISSED" in text else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MahaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
