#!/usr/bin/env python3
"""Split a Megatron .bin/.idx pair into consecutive documents: <output-prefix>_0, _1, ..., in constant memory."""

import argparse
from pathlib import Path

from maha_megatron.data.layout import read_index
from maha_megatron.data.prepare.pairs import split_pair
from maha_megatron.data.prepare.stage import progress_bar, run_command
from maha_megatron.errors import DataError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", required=True, help="path of the pair without its ending")
    parser.add_argument("--output-prefix", required=True, help="path of the new pairs without _0, _1, ...")
    parser.add_argument(
        "--shares", nargs="+", type=float, required=True, help="of the documents, in any unit: 98 1 1, or 1 1 1 1"
    )
    options = parser.parse_args()
    if min(options.shares) < 0 or sum(options.shares) <= 0:
        parser.error("--shares must not be negative, and one must be positive")
    return options


def main() -> None:
    """Write the pairs and say what they hold."""
    options = parse_arguments()
    index = read_index(options.input)
    documents = len(index.documents) - 1
    ends = [round(documents * sum(options.shares[: n + 1]) / sum(options.shares)) for n in range(len(options.shares))]
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if min(sizes) == 0:
        raise DataError(f"{options.input} has {documents} documents, too few for --shares: a part would be empty")
    outputs = [(Path(f"{options.output_prefix}_{number}"), size) for number, size in enumerate(sizes)]
    with progress_bar(index.bin_bytes, "split") as advance:
        split_pair(Path(options.input), outputs, arguments={"split": options.input}, advance=advance)
    for output, size in outputs:
        print(f"split: {output}: {size} documents, {read_index(output).tokens} tokens")


if __name__ == "__main__":
    run_command(main)
