#!/usr/bin/env python3
"""Gather text into one .jsonl file, a document a line: {"text": ..., "source": ...}.

Without --input it takes the Python sources and texts of the standard library and of the installed packages: real
text that this machine already has. With --input it takes any folder, .txt, .jsonl(.gz/.zst) or .parquet; with
--dataset it streams a data set of the Hugging Face hub, the only case that needs a network.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maha_megatron.data import writing
from maha_megatron.data.prepare.corpus import available_versions, machine_texts
from maha_megatron.data.prepare.digest import TextDigest, digest_of
from maha_megatron.data.prepare.inputs import refuse_output_in_input
from maha_megatron.data.prepare.stage import (
    dataset_identity,
    finished_record,
    input_identity,
    parse_bytes,
    progress_bar,
    record_path,
    run_command,
    write_record,
)
from maha_megatron.data.writing import whole_file
from maha_megatron.errors import DataError
from maha_megatron.units import format_bytes


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True, type=Path, help="the .jsonl file to write")
    parser.add_argument("--input", nargs="+", default=[], help="files or folders to read instead of this machine's")
    parser.add_argument(
        "--suffixes", nargs="+", help="in folders, take only files ending so (.c .h); default: all text"
    )
    parser.add_argument("--json-keys", default="text", help="field or column of --input or --dataset with the text")
    parser.add_argument("--dataset", help="name of a data set of the Hugging Face hub, streamed")
    parser.add_argument("--dataset-config", help="its configuration")
    parser.add_argument("--dataset-split", default="train", help="its split (default: train)")
    parser.add_argument("--bytes", type=parse_bytes, help="stop at so much text (24MB); default: 24MB without --input")
    parser.add_argument("--force", action="store_true", help="run again although it is done")
    arguments = parser.parse_args()
    if arguments.input and arguments.dataset:
        parser.error("give --input or --dataset, not both")
    if arguments.bytes is None and not arguments.input and not arguments.dataset:
        arguments.bytes = parse_bytes("24MB")
    return arguments


def main() -> None:
    """Write the corpus and its record, or say that both are there."""
    options = parse_arguments()
    refuse_output_in_input(options.output, [*options.input, *filter(None, [options.dataset])])
    dataset = options.dataset, options.dataset_config, options.dataset_split
    arguments = {
        "input": input_identity(options.input, options.suffixes) if options.input else None,
        "suffixes": options.suffixes,
        "key": options.json_keys,
        "dataset": dataset_identity(*dataset) if options.dataset else None,
        "bytes": options.bytes,
        "versions": None if options.input or options.dataset else available_versions(),
    }
    record = record_path(options.output)
    done = None if options.force else finished_record(record, [options.output], arguments)
    if done:
        print(f"corpus: done already: {options.output}, {done['text_bytes']} bytes of text (--force makes it again)")
        return
    record.unlink(missing_ok=True)
    results = write_corpus(options)
    write_record(record, arguments, results)
    for origin, taken in sorted(results["taken"].items(), key=lambda item: -item[1]["bytes"]):
        print(f"corpus: {origin}: {taken['documents']} documents, {format_bytes(taken['bytes'])}")
    if results["without_text"]:
        print(f"corpus: {results['without_text']} rows without text left out")
    print(f"corpus: {results['documents']} documents, {results['text_bytes']} bytes of text in {options.output}")


def write_corpus(options: argparse.Namespace) -> dict[str, Any]:
    """Write the documents and return what was taken."""
    taken: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0})
    digest = TextDigest()
    files = []
    text_bytes = without_text = 0
    with (
        whole_file(options.output) as partial,
        partial.open("wb") as stream,
        progress_bar(options.bytes, "corpus") as advance,
    ):
        for origin, source, text in _documents(options):
            if text is None:
                without_text += 1
                continue
            content = text.encode("utf-8", "replace")
            if options.bytes is not None and text_bytes + len(content) > options.bytes:
                break
            line = json.dumps({"text": content.decode(), "source": source}, ensure_ascii=False) + "\n"
            writing.write(stream, line.encode())
            digest = digest.join(digest_of([content]))
            text_bytes += len(content)
            taken[origin]["documents"] += 1
            taken[origin]["bytes"] += len(content)
            if not options.dataset:
                files.append([source, len(content)])
            advance(len(content))
        if text_bytes == 0:
            raise DataError("no text was found: check --input, --json-keys, --suffixes and --bytes")
    return {
        "documents": sum(part["documents"] for part in taken.values()),
        "text_bytes": text_bytes,
        "digest": digest.hex,
        "taken": dict(taken),
        "without_text": without_text,
        "files": files,
    }


def _documents(options: argparse.Namespace) -> Iterator[tuple[str, str, str | None]]:
    """(origin, source, text) of every document to write; None where a row of a data set has no text."""
    if options.dataset:
        yield from _hub_documents(options)
    elif options.input:
        from maha_megatron.data.prepare.documents import LeftOut, read_documents

        left_out, how = LeftOut(), {"key": options.json_keys, "suffixes": options.suffixes}
        try:
            for name in options.input:
                for document in read_documents([name], **how, left_out=left_out):
                    yield name, document.source, document.text
        finally:  # also when --bytes ends the reading
            if left_out.kinds:
                print(f"corpus: {left_out}")
    else:
        for file, text in machine_texts(options.bytes):
            yield file.origin, file.name, text


def _hub_documents(options: argparse.Namespace) -> Iterator[tuple[str, str, str | None]]:
    from maha_megatron.data.prepare.hub import HubSet, text_of_row

    source = HubSet(name=options.dataset, config=options.dataset_config, split=options.dataset_split)
    for number, row in enumerate(source.rows()):
        text = text_of_row(source, row, options.json_keys)
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"field {options.json_keys!r} of {options.dataset} holds no text but {type(text).__name__}: "
                "name another by --json-keys"
            )
        yield options.dataset, f"{options.dataset}:{number}", text


if __name__ == "__main__":
    run_command(main)
