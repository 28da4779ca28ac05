r"""Train the peers of a study side by side, evaluate them, and make its table.

    python tools/study.py --study configs/studies/peers_4k.yaml --folder runs/study \
        --data data/code_text_document --tokenizer data/tokenizer.model --gpus 0 1 --at-once 3

A study (configs/studies/) names peers, seeds and what all runs share. Each run is launch/pretrain.py on one GPU,
followed by tools/evaluate.py; --at-once of them share a GPU. Runs are made in the order of the file, seed by seed:
every peer has the first seed before any has the second. Give the same command again to go on: finished runs and
evaluations are skipped, a run that was cut off resumes from its newest checkpoint.

--until ends the work in time: after so many seconds nothing new starts; within a minute runs save and stop, and
evaluations end. Ctrl-C does the same; a second one ends everything at once, unsaved. --until 0 starts nothing: it makes
the table of what is there, with --reference against another peer. The table is written to tools/results/ as Markdown
and JSON, raw rows included, whenever at least one run is trained to its end.

exit codes:
  0   every run is trained and evaluated
  2   an error that names what to change, or a run that failed (the others are made first; the same command tries it
      again from its newest checkpoint; if the device had no memory left, with fewer --at-once)
  75  stopped by --until, SIGTERM or Ctrl-C with runs left: the same command continues
  130 ended by a second Ctrl-C
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from maha_megatron.config.study import Study, load_study
from maha_megatron.errors import ConfigError, TrainingError, exit_code_of

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN, EVALUATE = ROOT / "launch" / "pretrain.py", ROOT / "tools" / "evaluate.py"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, required=True, help="file of the study")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="the .bin/.idx pair that all runs train on")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer of the data")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/study"), help="receives STUDY/PEER/seed_N (default %(default)s)"
    )
    parser.add_argument("--reference", metavar="PEER", help="of the tables (default: that of the study)")
    parser.add_argument("--only", nargs="+", metavar="PEER", help="peers to run and to show (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="of those of the study (default: all)")
    parser.add_argument("--gpus", nargs="+", metavar="N", help="numbers of GPUs (default: all; none: the CPU)")
    parser.add_argument("--at-once", type=int, default=1, help="runs that share a GPU, or the CPU (default 1)")
    parser.add_argument("--until", type=float, metavar="SECONDS", help="stop in time; see above (default: never)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key in every run")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "tools" / "results", help="receives the tables (default tools/results)"
    )
    options = parser.parse_args(arguments)
    if options.at_once < 1:
        parser.error(f"--at-once {options.at_once}: needs at least 1")
    if options.until is not None and options.until < 0:
        parser.error(f"--until {options.until:g}: needs at least 0")
    return options


def places(gpus: Sequence[str] | None, at_once: int) -> list[str | None]:
    """The device of each process that may run at a time: GPU after GPU, then again.

    Raises:
        ConfigError: GPUs are named and there are none, or one is named twice.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    found = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        found = []
    unknown = [gpu for gpu in gpus or () if gpu not in found]
    if unknown:
        raise ConfigError(f"--gpus {' '.join(unknown)}: torch finds {' '.join(found) or 'no GPU'}; leave it out")
    if gpus and len(set(gpus)) < len(gpus):
        raise ConfigError(f"--gpus {' '.join(gpus)}: one is named twice; --at-once says how many runs share it")
    return [*(gpus or found or [None])] * at_once


def chosen(study: Study, only: Sequence[str] | None, seeds: Sequence[int] | None) -> tuple[list[str], list[int]]:
    """Peers and seeds of the command line, in the order of the study.

    Raises:
        ConfigError: the study has no such peer or seed.
    """
    found = []
    for option, asked, known in (("--only", only, list(study.peers)), ("--seeds", seeds, list(study.seeds))):
        unknown = [str(word) for word in asked or () if word not in known]
        if unknown:
            raise ConfigError(f"{option} {' '.join(unknown)}: the study has {' '.join(map(str, known))}")
        found.append([word for word in known if asked is None or word in asked])
    return found[0], found[1]


def run(options: argparse.Namespace) -> int:
    """Make the runs, print and write the tables; the exit code."""
    from maha_megatron.train.guards import EXIT_INTERRUPTED, StopSignal
    from maha_megatron.train.result_files import write_result
    from maha_megatron.train.side_by_side import SideBySide
    from maha_megatron.train.study_report import study_data, study_text
    from maha_megatron.train.study_runs import Stage, study_runs

    study = load_study(options.study)
    peers, seeds = chosen(study, options.only, options.seeds)
    reference = options.reference or study.reference
    if reference not in study.peers:
        raise ConfigError(f"--reference {reference}: the study has {' '.join(study.peers)}")
    at = places(options.gpus, options.at_once)
    where = {"folder": options.folder, "data": options.data, "tokenizer": options.tokenizer}
    runs = study_runs(study, peers=peers, seeds=seeds, overrides=options.set, **where)
    for one in runs:
        one.prepare()
    signal = StopSignal()
    signal.install()
    work = SideBySide(runs, at, pretrain=PRETRAIN, evaluate=EVALUATE, say=lambda line: print(line, flush=True))
    work.go(options.until, lambda: signal.requested)
    text = study_text(runs, reference)
    written = ()
    if any(one.is_trained for one in runs):
        data = {"study": study.name, "reference": reference, "runs": study_data(runs)}
        written = write_result(options.results, f"study_{study.name}", text=text, data=data)
    print(f"\n{text}", *written, sep="\n")
    if work.failures:
        raise TrainingError("\n\n".join(work.failures.values()))
    return 0 if all(one.stage is Stage.DONE for one in runs) else EXIT_INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; turn what users can mend into one line."""
    options = parse_arguments(arguments)
    try:
        return exit_code_of(lambda: run(options))
    except KeyboardInterrupt:
        print("\nended at once, unsaved; the same command continues from the newest checkpoints", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
