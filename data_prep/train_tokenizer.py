#!/usr/bin/env python3
"""Train a lossless SentencePiece tokenizer with byte fallback on any text that preprocess.py can read."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from maha_megatron.data.prepare.inputs import refuse_output_in_input
from maha_megatron.data.prepare.stage import (
    finished_record,
    input_identity,
    parse_bytes,
    progress_bar,
    record_path,
    run_command,
    write_record,
)
from maha_megatron.data.writing import write_whole
from maha_megatron.errors import DataError

SAMPLE_BYTES = {"bpe": 16_000_000, "unigram": 3_000_000}
"""About what two cores learn from in 10 seconds."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl(.gz/.zst), .parquet, text files or folders")
    parser.add_argument("--output", required=True, type=Path, help="the .model file to write")
    parser.add_argument("--vocabulary", type=int, default=32000, help="token ids (default: 32000)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: bpe, much faster")
    parser.add_argument(
        "--sample", type=parse_bytes, help="text to learn from (default: 16MB for bpe, 3MB for unigram)"
    )
    parser.add_argument("--json-keys", default="text", help="field or column with the text (default: text)")
    parser.add_argument("--force", action="store_true", help="run again although it is done")
    options = parser.parse_args()
    options.sample = options.sample or SAMPLE_BYTES[options.model_type]
    return options


def main() -> None:
    """Train the tokenizer, or say that it is there."""
    options = parse_arguments()
    refuse_output_in_input(options.output, options.input)
    identity = input_identity(options.input)
    arguments = {
        "input": identity,
        "vocabulary": options.vocabulary,
        "model_type": options.model_type,
        "sample": options.sample,
        "key": options.json_keys,
    }
    record = record_path(options.output)
    done = None if options.force else finished_record(record, [options.output], arguments)
    if done:
        print(f"tokenizer: done already: {options.output}, {options.vocabulary} token ids (--force makes it again)")
        return
    if options.output.suffix != ".model":
        raise DataError(f"--output {options.output} must end in .model")
    record.unlink(missing_ok=True)

    from maha_megatron.data.prepare.tokenizer_training import evenly, stretches, train_sentencepiece

    total_bytes = sum(size for _, size, _ in identity)
    sample = evenly(stretches(_texts(options, total_bytes)), total_bytes=total_bytes, sample_bytes=options.sample)
    model = train_sentencepiece(sample, vocabulary=options.vocabulary, kind=options.model_type)
    write_whole(options.output, model)
    write_record(record, arguments, {"model_bytes": len(model)})
    print(f"tokenizer: {options.vocabulary} token ids ({options.model_type}) in {options.output}")


def _texts(options: argparse.Namespace, total_bytes: int) -> Iterator[str]:
    """Texts of the input's documents, with progress; at the end, say that learning begins."""
    from maha_megatron.data.prepare.documents import LeftOut, read_documents

    left_out = LeftOut()
    with progress_bar(total_bytes, "tokenizer: reading") as advance:
        for document in read_documents(options.input, key=options.json_keys, left_out=left_out):
            advance(len(document.text))
            yield document.text
    if left_out.kinds:
        print(f"tokenizer: {left_out}")
    print(f"tokenizer: learning {options.vocabulary} pieces ...", flush=True)


if __name__ == "__main__":
    run_command(main)
