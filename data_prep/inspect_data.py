#!/usr/bin/env python3
"""Look into Megatron .bin/.idx pairs: documents, their lengths, decoded samples, exact duplicates, tokens per source.

With --plot the lengths' histogram becomes a PNG; with --duplicates documents that repeat an earlier one token for
token are counted and the first ones listed. --check reads every byte and holds it against the checksums.
"""

import argparse
from pathlib import Path
from typing import Any

from maha_megatron.data.manifest import read_manifest
from maha_megatron.data.pair import Pair, open_pair
from maha_megatron.data.prepare.inspection import exact_duplicates, measure_lengths, plot_lengths, sampled_documents
from maha_megatron.data.prepare.stage import run_command
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.errors import DataError
from maha_megatron.units import format_bytes, format_count

LISTED_DUPLICATES = 10


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prefix", nargs="+", help="path of a pair without its ending")
    parser.add_argument("--tokenizer-model", help="decodes the samples; without it they are shown as ids")
    parser.add_argument("--samples", type=int, default=3, help="documents to show (default: 3)")
    parser.add_argument("--document", type=int, nargs="+", default=[], help="numbers of documents to show as well")
    parser.add_argument("--tokens", type=int, default=60, help="tokens to show of each (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="which documents are shown (default: 0)")
    parser.add_argument("--plot", type=Path, help="folder for <name>.lengths.png")
    parser.add_argument("--duplicates", action="store_true", help="look for exact duplicates; reads everything")
    parser.add_argument("--check", action="store_true", help="hold every byte against the checksums")
    return parser.parse_args()


def main() -> None:
    """Print what every pair holds."""
    options = parse_arguments()
    tokenizer = load_tokenizer(options.tokenizer_model) if options.tokenizer_model else None
    for prefix in options.prefix:
        show(prefix, options, tokenizer)


def show(prefix: str, options: argparse.Namespace, tokenizer: Any) -> None:
    """Print what a pair holds."""
    pair, manifest = open_pair(prefix), read_manifest(prefix)
    if tokenizer and manifest and manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(f"{prefix} was made with another tokenizer than {options.tokenizer_model}: name its own")
    lengths = measure_lengths(pair.index)
    size = format_bytes(pair.index.bin_bytes)
    print(
        f"{prefix}: {lengths.documents} documents ({lengths.empty} empty), {format_count(lengths.tokens)} tokens as"
        f" {pair.index.item_type.name}, {size}"
    )
    spread = ", ".join(f"{percent} %: {tokens}" for percent, tokens in lengths.percentiles.items())
    print(f"  tokens of a document: least {lengths.least}, {spread}, most {lengths.most}")
    for power, count in enumerate(lengths.by_power):
        if count:
            print(f"  {2**power:>12} .. {2 ** (power + 1) - 1:<12} {count}")
    for source in manifest.sources if manifest else ():
        known = ", ".join(filter(None, [source.licence, source.revision]))
        print(
            f"  source {source.name}: {source.documents} documents, {format_count(source.tokens)} tokens"
            f" ({100 * source.tokens / lengths.tokens:.1f} %), {source.text_bytes} bytes{', ' + known if known else ''}"
        )
    for number in sorted({*sampled_documents(pair, options.samples, options.seed), *options.document}):
        if not 0 <= number < pair.documents:
            raise DataError(f"--document {number}: {prefix} has documents 0 to {pair.documents - 1}")
        print(f"  document {number}: {_shown(pair, number, options.tokens, tokenizer)}")
    if options.plot:
        options.plot.mkdir(parents=True, exist_ok=True)
        path = options.plot / f"{Path(prefix).name}.lengths.png"
        plot_lengths(lengths, Path(prefix).name, path)
        print(f"  lengths: {path}")
    if options.check:
        pair.check_all()
        print("  every byte is what the manifest's checksums say")
    if options.duplicates:
        found = exact_duplicates(pair)
        print(f"  {len(found)} documents repeat an earlier one exactly")
        for first, repetition in found[:LISTED_DUPLICATES]:
            print(f"    document {repetition} repeats document {first}")


def _shown(pair: Pair, number: int, tokens: int, tokenizer: Any) -> str:
    ids = pair.document(number)
    more = " ..." if ids.size > tokens else ""
    ids = ids[:tokens].tolist()
    return (repr(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids))) + more


if __name__ == "__main__":
    run_command(main)
