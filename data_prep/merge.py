#!/usr/bin/env python3
"""Merge Megatron .bin/.idx pairs into one, in order, in constant memory; holes of sparse files stay holes."""

import argparse
from pathlib import Path

from maha_megatron.data.layout import read_index
from maha_megatron.data.prepare.pairs import merge_pairs
from maha_megatron.data.prepare.stage import progress_bar, run_command
from maha_megatron.units import format_count


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input", nargs="+", required=True, help="paths of the pairs without their endings, in the order they get"
    )
    parser.add_argument("--output-prefix", required=True, type=Path, help="path of the new pair without its ending")
    return parser.parse_args()


def main() -> None:
    """Write the pair and say what it holds."""
    options = parse_arguments()
    total_bytes = sum(read_index(prefix).bin_bytes for prefix in options.input)
    with progress_bar(total_bytes, "merge") as advance:
        manifest = merge_pairs(
            [Path(prefix) for prefix in options.input],
            options.output_prefix,
            arguments={"merged": options.input},
            advance=advance,
        )
    index = read_index(options.output_prefix)
    print(
        f"merge: {options.output_prefix}: {len(index.documents) - 1} documents, {format_count(index.tokens)} tokens"
        + ("" if manifest else "; an input has no manifest, so the tokenizer is not known and this one has none")
    )


if __name__ == "__main__":
    run_command(main)
