#!/usr/bin/env python
"""Train a language model from one YAML file.

    deepspeed --num_gpus N launch/pretrain.py --config configs/run/quickstart.yaml
    torchrun --nproc-per-node N launch/pretrain.py --config ... --set train.steps=200
    python launch/pretrain.py --config ...                        (one process)

Starting the same command again continues from the newest checkpoint in run.folder.

exit codes:
  0   trained to train.steps
  2   an error that names what to change: configuration, data, checkpoint, full disk, loss that is not a number
  75  stopped by SIGTERM or Ctrl-C after the step at hand, saved: the same command continues
  130 stopped at once by a second Ctrl-C, or one before the run began; nothing more was saved
  1   anything else (a defect: please report the traceback)
"""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from maha_megatron.config import programs
from maha_megatron.config.load import dump_yaml, load_config
from maha_megatron.config.rules import check_topology
from maha_megatron.config.schema import Config
from maha_megatron.errors import EXIT_USER_ERROR, MahaError

EXIT_DEFECT, EXIT_KILLED_BY_USER = 1, 130
LAUNCHER_GRACE_S = 5


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="run or model YAML file; defaults fill the rest")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key, for example --set train.steps=200; may be repeated, the last one wins",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        type=int,
        const=0,
        metavar="RANKS",
        help="build without weights; print parameters, memory and FLOPs for RANKS ranks (default: this launch's), stop",
    )
    parser.add_argument(programs.OPTION, metavar="MODULE:FUNCTION", help=programs.OPTION_HELP)
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # given by deepspeed
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks for; the exit code."""
    config = load_config(options.config, options.overrides)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if options.allow_program is not None:  # looking needs no permission, but one for something else is a mistake
        programs.allowed_program(config, options.allow_program)
    if options.print_config:
        print(dump_yaml(config), end="")
        return 0
    if options.dry_run is not None:
        ranks = options.dry_run or max(world_size, config.parallel.tensor)
        check_topology(config, ranks)
        from maha_megatron.train.dry_run import dry_run

        print(dry_run(config, ranks))
        return 0
    check_topology(config, world_size)
    programs.allowed_program(config, options.allow_program)  # before anything slow, and before anything is imported
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    return _train(config, options.allow_program)


def _train(config: Config, allow_program: str | None) -> int:
    if not _has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    from maha_megatron.train.loop import train

    return train(config, allow_program=allow_program)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _report(text: str) -> None:
    """Say it once: rank 0 at once; another rank only if no launcher ends it first, because then rank 0 is well."""
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no longer a wish to stop after the step
        time.sleep(LAUNCHER_GRACE_S)
        text = f"rank {rank}: {text}"
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; turn what users can mend into one line."""
    try:
        return run(parse_arguments(arguments))
    except MahaError as error:
        _report(f"error: {error}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("stopped at once, nothing more was saved", file=sys.stderr, flush=True)
        return EXIT_KILLED_BY_USER
    except Exception:
        _report(traceback.format_exc())
        return EXIT_DEFECT


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: other ranks may wait in a collective, and tearing down its group would wait for them
    os._exit(code)
