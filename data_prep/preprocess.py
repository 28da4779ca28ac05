#!/usr/bin/env python3
"""Tokenise text into Megatron .bin/.idx pairs, named as Megatron names them: <output-prefix>_<key>_document.

Reads .jsonl(.gz/.zst), .parquet, text files and folders of these; the flags are those of Megatron's preprocessing.
The pair is what data.train of a run's configuration names; beside it lies a manifest with the tokenizer's
fingerprint, which training checks.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maha_megatron.data.manifest import Manifest, manifest_path, read_manifest
from maha_megatron.data.prepare.stage import finished_record, input_identity, progress_bar, run_command
from maha_megatron.errors import DataError
from maha_megatron.units import format_count

WORTH_A_WORKER_BYTES = 8_000_000


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl(.gz/.zst), .parquet, text files or folders")
    parser.add_argument("--output-prefix", required=True, help="path of the pairs without _<key>_document.bin")
    parser.add_argument("--tokenizer-model", required=True, help=".model file, tokenizer.json or Hugging Face folder")
    parser.add_argument(
        "--tokenizer-type",
        choices=("SentencePieceTokenizer", "HuggingFaceTokenizer"),
        help="what --tokenizer-model must be (default: what it is)",
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="fields to make a pair of (default: text)")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core, fewer where the input is small)")
    parser.add_argument("--force", action="store_true", help="run again although it is done")
    options = parser.parse_args()
    if options.workers is not None and options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def main() -> None:
    """Write one pair per key, or say that it is there."""
    options = parse_arguments()
    identity = input_identity(options.input)
    for key in options.json_keys:
        prefix = Path(f"{options.output_prefix}_{key}_document")
        arguments = {
            "input": identity,
            "key": key,
            "tokenizer": input_identity([options.tokenizer_model]),
            "append_eod": options.append_eod,
        }
        outputs = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        if not options.force and finished_record(manifest_path(prefix), outputs, arguments):
            manifest = read_manifest(prefix)
            print(f"preprocess: done already: {prefix} (--force makes it again)")
        else:
            manifest = _write(options, key, prefix, arguments)
        assert manifest is not None
        report(prefix, manifest)


def report(prefix: Path, manifest: Manifest) -> None:
    """Print what a pair holds."""
    print(
        f"preprocess: {prefix}: {manifest.documents} documents, {format_count(manifest.tokens)} tokens,"
        f" {manifest.bytes_per_token:.3f} bytes per token ({1 / manifest.bytes_per_token:.3f} tokens per byte),"
        f" unigram entropy {manifest.unigram_entropy_nats:.3f} nats per token"
    )
    print(
        f"preprocess: in a configuration: data.train: [{{prefix: {prefix}}}], model.vocabulary: {manifest.vocabulary}"
    )


def _write(options: argparse.Namespace, key: str, prefix: Path, arguments: dict[str, Any]) -> Manifest:
    _check_tokenizer_type(options)

    from maha_megatron.data.prepare.encode import write_pair

    total_bytes = sum(size for _, size, _ in arguments["input"])
    with progress_bar(total_bytes, f"preprocess {key}") as advance:
        return write_pair(
            _texts(options.input, key),
            prefix,
            tokenizer_path=options.tokenizer_model,
            append_end=options.append_eod,
            workers=options.workers or _default_workers(total_bytes),
            arguments=arguments,
            advance=advance,
        )


def _default_workers(total_bytes: int) -> int:
    return min(os.cpu_count() or 1, 1 + total_bytes // WORTH_A_WORKER_BYTES)


def _check_tokenizer_type(options: argparse.Namespace) -> None:
    from maha_megatron.data.tokenizer import load_tokenizer

    kind = type(load_tokenizer(options.tokenizer_model)).__name__
    if options.tokenizer_type not in (None, kind):
        raise DataError(f"--tokenizer-model {options.tokenizer_model} is a {kind}, not a {options.tokenizer_type}")


def _texts(inputs: Sequence[str], key: str) -> Iterator[str]:
    from maha_megatron.data.prepare.documents import read_documents

    for document in read_documents(inputs, key=key):
        yield document.text


if __name__ == "__main__":
    run_command(main)
