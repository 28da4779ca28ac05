#!/usr/bin/env python
"""Continue a prompt with a trained run's newest, or any, checkpoint. One process; a GPU is used if there is one.

python tools/generate.py --run runs/quickstart/train --prompt "def main" --tokens 100 --temperature 0.8 --top-p 0.95
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, installed or not

from maha_megatron.config import programs
from maha_megatron.errors import exit_code_of


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run (run.folder)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint; default: the newest")
    parser.add_argument("--prompt", default="", help="text to continue; empty: start a new document")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="only the likeliest of this mass (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws (%(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer, if it has moved since the run (default: the run's)")
    parser.add_argument("--output", type=Path, help="also write the text into this file")
    parser.add_argument(programs.OPTION, metavar="MODULE:FUNCTION", help=programs.OPTION_HELP)
    options = parser.parse_args(arguments)
    if options.temperature < 0 or options.top_k < 0 or not 0 < options.top_p <= 1 or options.tokens < 1:
        parser.error("needs --temperature >= 0, --top-k >= 0, 0 < --top-p <= 1 and --tokens >= 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Load, sample, print."""
    from maha_megatron.checkpoint.load import find_checkpoint
    from maha_megatron.checkpoint.trained import open_trained
    from maha_megatron.model.generation import Sampling, generate
    from maha_megatron.parallel import compat

    trained = open_trained(
        find_checkpoint(options.run, options.checkpoint), options.tokenizer, allow_program=options.allow_program
    )
    config, tokenizer, model = trained.config, trained.tokenizer, trained.model
    prompt = tokenizer.encode(options.prompt) or [tokenizer.end_of_document]
    new = generate(
        model,
        prompt,
        tokens=options.tokens,
        context_tokens=config.data.sequence_tokens,
        sampling=Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p),
        seed=options.seed,
        end=tokenizer.end_of_document,
    )
    ids, shown = [], options.prompt
    print(shown, end="", flush=True)
    for token in new:
        ids.append(token)
        text = options.prompt + tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character may take several tokens: wait until it is whole
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(options.prompt + tokenizer.decode(ids) + "\n", encoding="utf-8")
    compat.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; turn what users can mend into one line."""
    options = parse_arguments(arguments)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    return exit_code_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
