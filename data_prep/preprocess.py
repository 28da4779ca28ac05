#!/usr/bin/env python3
"""Tokenise text into Megatron .bin/.idx pairs, named as Megatron names them: <output-prefix>_<key>_document.

Reads .jsonl(.gz/.zst), .parquet, text files, folders of these, and data sets of the `datasets` package (--dataset);
the flags are those of Megatron's preprocessing. The pair is what data.train of a run's configuration names; beside it
lie a manifest with the tokenizer's fingerprint, which training checks, and checksums. A run that was killed continues
when the same command is given again, and the bytes are the same; neither --workers nor --partitions changes them.

Lines that give no document (no JSON, not UTF-8, no such field, no text in it, too long) and files that cannot be read
are left out, counted, and listed in <prefix>.bad_lines.jsonl; with --strict the first one ends the run.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from maha_megatron.data.manifest import Manifest, read_manifest
from maha_megatron.data.prepare.finished import finished_pair
from maha_megatron.data.prepare.inputs import refuse_output_in_input
from maha_megatron.data.prepare.stage import (
    dataset_identity,
    document_progress,
    input_identity,
    parse_bytes,
    progress_bar,
    run_command,
)
from maha_megatron.data.prepare.work_folder import remove_leftover
from maha_megatron.errors import DataError
from maha_megatron.units import format_count

WORTH_A_WORKER_BYTES = 8_000_000
TYPES = {
    "SentencePieceTokenizer": "SentencePieceTokenizer",
    "Llama2Tokenizer": "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
    "HuggingFaceTokenizer": "HuggingFaceTokenizer",
    "GPT2BPETokenizer": "HuggingFaceTokenizer",
}
"""Megatron's names of tokenizers, and the class of ours that reads them."""
BEGINNING_TYPE = "Llama2Tokenizer"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_argument_group("input")
    source.add_argument("--input", nargs="+", default=[], help=".jsonl(.gz/.zst), .parquet, text files or folders")
    source.add_argument("--dataset", help="instead: a data set of the hub, or a local folder of one, streamed")
    source.add_argument("--dataset-config", help="its configuration")
    source.add_argument("--dataset-split", default="train", help="its split (default: train)")
    source.add_argument("--json-keys", nargs="+", default=["text"], help="fields to make a pair of (default: text)")
    source.add_argument("--licence", default="", help="kept in the manifest; default: what the data set says")
    source.add_argument("--revision", help="of the input, kept in the manifest; of a hub data set the one to read")
    source.add_argument("--strict", action="store_true", help="stop at the first bad line, with file and line")
    source.add_argument(
        "--longest-document",
        type=parse_bytes,
        default=parse_bytes("16MB"),
        help="longer lines are left out, longer texts become several documents; both are counted and listed"
        " (default: 16MB)",
    )
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-model", help=".model file, tokenizer.json or Hugging Face folder")
    tokenizer.add_argument("--vocab-file", help="instead, of a byte-level BPE: vocab.json")
    tokenizer.add_argument("--merge-file", help="and its merges.txt")
    tokenizer.add_argument(
        "--tokenizer-type",
        choices=TYPES,
        help=f"what it must be (default: what it is); as in Megatron, {BEGINNING_TYPE} begins every document with <s>,"
        " and no other does",
    )
    tokenizer.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, help="path of the pairs without _<key>_document.bin")
    output.add_argument("--workers", type=int, help="that tokenise (default: one per core, fewer for small inputs)")
    output.add_argument("--partitions", type=int, default=1, help="reading processes, for hundreds of cores")
    output.add_argument("--force", action="store_true", help="run again although it is done")
    options = parser.parse_args()
    options.json_keys = list(dict.fromkeys(options.json_keys))
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("workers", "partitions"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if bool(options.input) == bool(options.dataset):
        parser.error("give --input or --dataset")
    if options.dataset and options.partitions > 1:
        parser.error("--partitions cuts files, and --dataset is one stream: leave it out")
    if options.dataset is None and (options.dataset_config or options.dataset_split != "train"):
        parser.error("--dataset-config and --dataset-split belong to --dataset")
    if bool(options.vocab_file) != bool(options.merge_file) or bool(options.vocab_file) == bool(
        options.tokenizer_model
    ):
        parser.error("give --tokenizer-model, or --vocab-file with --merge-file")


def main() -> None:
    """Write one pair per key, all from one reading, or say that it is there."""
    options = parse_arguments()
    prefixes = {key: Path(f"{options.output_prefix}_{key}_document") for key in options.json_keys}
    missing = {}
    for key, prefix in prefixes.items():
        refuse_output_in_input(prefix, options.input or [options.dataset])
        arguments = _arguments(options, key)
        if not options.force and _finished(prefix, arguments):
            print(f"preprocess: done already: {prefix} (--force makes it again)")
        else:
            missing[key] = prefix, arguments
    if missing:
        _write(options, missing)
    for prefix in prefixes.values():
        manifest = read_manifest(prefix)
        assert manifest is not None
        remove_leftover(prefix)
        report(prefix, manifest)


def _finished(prefix: Path, arguments: dict[str, Any]) -> Manifest | None:
    bin_path = Path(f"{prefix}.bin")
    if not bin_path.is_file():
        return None
    with progress_bar(bin_path.stat().st_size, "check what is there") as advance:
        return finished_pair(prefix, arguments, advance=advance, say=_say)


def _say(text: str) -> None:
    print(f"preprocess: {text}")


def _arguments(options: argparse.Namespace, key: str) -> dict[str, Any]:
    """What the pair depends on. What is as it always was is left out, so that pairs of older versions stay done."""
    if options.dataset:
        source = dataset_identity(options.dataset, options.dataset_config, options.dataset_split, options.revision)
    else:
        source = input_identity(options.input)
    tokenizer = [options.tokenizer_model] if options.tokenizer_model else [options.vocab_file, options.merge_file]
    for name in tokenizer:
        if not Path(name).exists():
            flags = "--tokenizer-model" if options.tokenizer_model else "--vocab-file and --merge-file"
            raise DataError(f"the tokenizer {name} does not exist: give its path by {flags}")
    arguments = {"input": source, "key": key, "tokenizer": input_identity(tokenizer), "append_eod": options.append_eod}
    if options.longest_document != parse_bytes("16MB"):
        arguments["longest_document"] = options.longest_document
    if options.tokenizer_type == BEGINNING_TYPE:
        arguments["prepend_begin"] = True
    if options.strict:
        arguments["strict"] = True
    if options.licence or options.revision:
        arguments["licence and revision"] = [options.licence, options.revision]
    return arguments


def report(prefix: Path, manifest: Manifest) -> None:
    """Print what a pair holds."""
    rate = manifest.bytes_per_token
    text = f"{rate:.3f} bytes per token ({1 / rate:.3f} tokens per byte)" if rate else "no text"
    print(
        f"preprocess: {prefix}: {manifest.documents} documents, {format_count(manifest.tokens)} tokens, {text},"
        f" unigram entropy {manifest.unigram_entropy_nats:.3f} nats per token"
    )
    if manifest.bad_lines:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(manifest.bad_lines.items()))
        print(
            f"preprocess: warning: {sum(manifest.bad_lines.values())} lines or files were left out, cut or damaged"
            f" ({kinds}); they are listed in {prefix}.bad_lines.jsonl"
        )
    print(
        f"preprocess: in a configuration: data.train: [{{prefix: {prefix}}}], model.vocabulary: {manifest.vocabulary}"
    )


def _write(options: argparse.Namespace, missing: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """Write the pairs of some keys, each given by prefix and arguments."""
    _check_tokenizer_type(options)

    from maha_megatron.data.prepare.blocks import read_blocks
    from maha_megatron.data.prepare.encode import Output, progress_of, write_pairs
    from maha_megatron.data.prepare.encoding import EncodingSettings
    from maha_megatron.data.prepare.hub import HubSet, hub_blocks
    from maha_megatron.data.prepare.inputs import list_inputs
    from maha_megatron.data.prepare.partitions import write_in_partitions

    settings = EncodingSettings(
        tokenizer=options.tokenizer_model or options.vocab_file,
        merges=options.merge_file,
        append_end=options.append_eod,
        prepend_begin=options.tokenizer_type == BEGINNING_TYPE,
        strict=options.strict,
        longest_bytes=options.longest_document,
    )
    keys, outputs = list(missing), [Output(key, *pair) for key, pair in missing.items()]
    total_bytes = None if options.dataset else sum(size for _, size, _ in outputs[0].arguments["input"])
    common = {
        "settings": settings,
        "workers": options.workers or _default_workers(total_bytes),
        "say": _say,
        "revisions": dict.fromkeys(options.input, (options.licence, options.revision or "")),
    }
    with document_progress(total_bytes, f"preprocess {' '.join(keys)}") as update:
        if options.partitions > 1:
            files = list_inputs(options.input)
            write_in_partitions(files, outputs, partitions=options.partitions, advance=update, **common)
            return
        if options.dataset:
            source = HubSet(
                name=options.dataset,
                config=options.dataset_config,
                split=options.dataset_split,
                revision=options.revision,
            )
            common["revisions"] = {source.name: (options.licence or source.licence(), options.revision or "")}
            blocks = partial(hub_blocks, source, keys)
        else:
            blocks = partial(read_blocks, list_inputs(options.input), keys, longest_bytes=options.longest_document)
        write_pairs(blocks, outputs, advance=lambda spools: update(*progress_of(spools)), **common)


def _default_workers(total_bytes: int | None) -> int:
    cores = os.cpu_count() or 1
    return cores if total_bytes is None else min(cores, 1 + total_bytes // WORTH_A_WORKER_BYTES)


def _check_tokenizer_type(options: argparse.Namespace) -> None:
    from maha_megatron.data.tokenizer import load_tokenizer

    path = options.tokenizer_model or options.vocab_file
    tokenizer = load_tokenizer(path, options.merge_file)
    kind = type(tokenizer).__name__
    if options.tokenizer_type and TYPES[options.tokenizer_type] != kind:
        raise DataError(f"the tokenizer {path} is a {kind}, not a {options.tokenizer_type}")
    if options.tokenizer_type == BEGINNING_TYPE and tokenizer.begin_of_document < 0:
        raise DataError(f"{path} has no <s> to begin documents with: use --tokenizer-type GPTSentencePieceTokenizer")


if __name__ == "__main__":
    run_command(main)
