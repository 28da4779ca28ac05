#!/usr/bin/env python
"""What a trained run can do, from its newest, or any, checkpoint: loss by position, and recall by distance.

    python tools/evaluate.py --run runs/quickstart/train
    python tools/evaluate.py --run runs/mine --sequence 16384 --distances 128 4096 16000 --data data/held_out

Prints tables and writes them as Markdown and JSON. One process; a GPU is used if there is one. Three parts:
- loss by position: nats of validation tokens by how many tokens of their document come before them;
- needle: a random key with a random value is planted in real text; at the end the key is repeated, and the value is to
  be predicted; beside it the same question without the needle;
- associative recall: random key-value pairs in a row, one key asked for.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from maha_megatron.config import programs
from maha_megatron.errors import exit_code_of


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run (run.folder)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint; default: the newest")
    parser.add_argument("--data", metavar="PREFIX", help="a .bin/.idx pair (default: the run's validation split)")
    parser.add_argument("--sequence", type=int, metavar="TOKENS", help="length of a sequence (default: the run's)")
    parser.add_argument(
        "--samples",
        type=int,
        help="sequences for loss by position; 0: none (default: the run's train.validation_samples)",
    )
    parser.add_argument("--needles", type=int, default=32, help="needles at each distance; 0: none (%(default)s)")
    parser.add_argument(
        "--distances",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="from a value to its repetition (default: those of 128 512 2048 4096 8192 16384 that fit into the "
        "sequence, and the farthest that does)",
    )
    parser.add_argument("--queries", type=int, default=512, help="of associative recall; 0: none (%(default)s)")
    parser.add_argument("--pairs", type=int, help="key-value pairs in a row (default: 64, or as many as fit)")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, help="rows of one forward pass, at least a sequence (%(default)s)"
    )
    parser.add_argument("--seed", type=int, help="of keys and values (default: 1234)")
    parser.add_argument("--tokenizer", help="tokenizer, if it has moved since the run (default: the run's)")
    parser.add_argument(
        "--results", type=Path, help="folder of the files (default: evaluation/STEP in the run's folder)"
    )
    parser.add_argument(programs.OPTION, metavar="MODULE:FUNCTION", help=programs.OPTION_HELP)
    options = parser.parse_args(arguments)
    for name, least in (("samples", 0), ("needles", 0), ("queries", 0), ("seed", 0), ("sequence", 1), ("pairs", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: needs at least {least}")
    if options.batch_tokens < 1:
        parser.error("--batch-tokens needs at least 1")
    for name, parts in (("distances", ("needles",)), ("pairs", ("queries",)), ("seed", ("needles", "queries"))):
        if getattr(options, name) is not None and not any(getattr(options, part) for part in parts):
            zero = " and ".join(f"--{part} 0" for part in parts)
            parser.error(f"--{name} has no effect with {zero}: remove it")
    if options.samples == options.needles == options.queries == 0:
        parser.error("--samples, --needles and --queries are all 0: nothing would be measured")
    return options


def run(options: argparse.Namespace) -> None:
    """Load, measure, print, write."""
    from maha_megatron.checkpoint.load import find_checkpoint
    from maha_megatron.checkpoint.trained import open_trained
    from maha_megatron.parallel import compat
    from maha_megatron.train.evaluation import Settings, evaluate
    from maha_megatron.train.evaluation_report import findings_text
    from maha_megatron.train.result_files import write_result

    checkpoint = find_checkpoint(options.run, options.checkpoint)
    settings = Settings(
        sequence_tokens=options.sequence,
        data=options.data,
        samples=options.samples,
        needles=options.needles,
        distances=tuple(options.distances) if options.distances else None,
        queries=options.queries,
        pairs=options.pairs,
        batch_tokens=options.batch_tokens,
        seed=1234 if options.seed is None else options.seed,
    )
    trained = open_trained(checkpoint, options.tokenizer, allow_program=options.allow_program)
    findings = evaluate(trained, settings, run_folder=options.run, tokenizer_path=options.tokenizer)
    compat.shutdown()
    text = findings_text(findings)
    print(text)
    folder = options.results or options.run / "evaluation" / checkpoint.name
    data = {"checkpoint": str(checkpoint), "config": asdict(trained.config), **findings.as_data()}
    written = write_result(folder, "evaluate", text=f"Checkpoint {checkpoint}.\n\n{text}", data=data)
    print(f"\nwritten: {' '.join(map(str, written))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; turn what users can mend into one line."""
    options = parse_arguments(arguments)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    return exit_code_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
