"""The data order of a configuration: build its indexes, explain a step's batch, measure the loader.

    python tools/data.py index     --config FILE            build every index that the run needs; no accelerator
    python tools/data.py explain   --config FILE --step K   the documents of a step's batch: source, place and text
    python tools/data.py benchmark --config FILE            time to start, and tokens/s of one loader

`index` fills data.cache (or run.folder/index); a run that finds its indexes there builds none. It also tells of every
source what was asked and what the run draws, how often documents are cut, and the share of padding.
"""

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from maha_megatron.config.load import load_config
from maha_megatron.config.schema import Config
from maha_megatron.data.loader import Loader, SampleOrigin, build_loader
from maha_megatron.data.tokenizer import Tokenizer, load_tokenizer
from maha_megatron.errors import DataError, exit_code_of
from maha_megatron.units import format_count


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="build every index that the run needs", allow_abbrev=False)
    explain = commands.add_parser("explain", help="the documents of a step's batch", allow_abbrev=False)
    benchmark = commands.add_parser("benchmark", help="time to start, tokens/s of one loader", allow_abbrev=False)
    for command in (index, explain, benchmark):
        command.add_argument("--config", required=True, help="run file")
        command.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key; repeatable")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    explain.add_argument("--step", type=int, required=True, help="optimizer step, counted from 1")
    explain.add_argument("--characters", type=int, default=60, help="of each document's text to print (default: 60)")
    benchmark.add_argument("--seconds", type=float, default=10.0, help="how long to read (default: 10)")
    return parser.parse_args(arguments)


def main() -> int:
    """Run; turn what users can mend into one line."""
    options = parse_arguments()
    command = {"index": index, "explain": explain, "benchmark": benchmark}[options.command]
    return exit_code_of(lambda: print(command(load_config(options.config, options.set), options)))


def index(config: Config, options: argparse.Namespace) -> str:
    """Build the indexes; a table of the sources."""
    train, validation = (_loader(config, split) for split in ("train", "validation"))
    planned = config.train.steps * config.train.global_batch_samples
    validated, asked = validation.validation_samples(), config.train.validation_samples
    report = {
        "built": train.build_indexes(0, planned) + validation.build_indexes(0, 0),
        "train": train.describe_sources(planned),
        "validation": validation.describe_sources(validated),
        "validation_samples": validated,
    }
    if options.json:
        return json.dumps(report, indent=2)
    lines = [f"{report['built']} indexes are stored for {config.train.steps} steps"]
    if not report["built"]:
        lines = ["no index is stored: the sources are so small that each process makes its own in no time"]
    for split in ("train", "validation"):
        lines.append(f"{split}: source, documents, tokens, samples an epoch; asked, drawn, epochs; cuts, padding")
        lines += [f"  {_source_line(source)}" for source in report[split]]
    if validated < asked:
        lines.append(
            f"validation reads {validated} of the {asked} samples asked for: with more, a source would repeat some"
        )
    return "\n".join(lines)


def _source_line(source: dict[str, Any]) -> str:
    return (
        f"{source['name']}: {source['documents']}, {format_count(source['tokens'])}, {source['samples_per_epoch']};"
        f" {100 * source['asked_frac']:.4g} %, {100 * source['drawn_frac']:.4g} %, {source['epochs']:.4g};"
        f" {source['cuts']}, {100 * source['padding_frac']:.3g} %"
    )


def explain(config: Config, options: argparse.Namespace) -> str:
    """The documents of a step's batch."""
    if options.step < 1:
        raise DataError(f"--step {options.step}: steps are counted from 1")
    loader = _loader(config, "train")
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    consumed = (options.step - 1) * config.train.global_batch_samples
    samples = [_explained(origin, tokenizer) for origin in loader.origins(consumed)]
    if options.json:
        return json.dumps({"step": options.step, "samples": samples})
    lines = []
    for sample in samples:
        lines.append(f"sample {sample['number']}: {sample['source']}, epoch {sample['epoch']}")
        for part in sample["documents"]:
            text = part.get("text", " ".join(map(str, part["tokens"])))
            shown = text[: options.characters] + (" ..." if len(text) > options.characters else "")
            place = f"tokens {part['offset']} to {part['offset'] + len(part['tokens']) - 1}"
            lines.append(f"  document {part['document']}, {place}: {shown!r}")
    return "\n".join(lines)


def _explained(origin: SampleOrigin, tokenizer: Tokenizer | None) -> dict[str, Any]:
    tokens, begin, documents = np.concatenate(origin.runs).tolist(), 0, []
    for part in origin.documents:
        held = tokens[begin : begin + part.tokens]
        documents.append({"document": part.document, "offset": part.offset, "tokens": held})
        if tokenizer:
            documents[-1]["text"] = tokenizer.decode(held)
        begin += part.tokens
    return {"number": origin.number, "source": origin.source, "epoch": origin.epoch, "documents": documents}


def benchmark(config: Config, options: argparse.Namespace) -> str:
    """Time to open everything and give the first step, and tokens/s of steps after that, checksums included."""
    began_s = time.perf_counter()
    loader = _loader(config, "train")
    loader.step_batches(0)
    started_s = time.perf_counter() - began_s
    began_s, steps = time.perf_counter(), 0
    while time.perf_counter() - began_s < options.seconds:
        steps += 1
        loader.step_batches(steps * config.train.global_batch_samples)
    elapsed_s = time.perf_counter() - began_s
    tokens = steps * config.train.global_batch_samples * config.data.sequence_tokens
    report = {"start_s": started_s, "steps": steps, "tokens_per_s": tokens / elapsed_s}
    if options.json:
        return json.dumps(report)
    return f"first batch after {started_s:.2f} s; then {format_count(report['tokens_per_s'])} tokens/s in one process"


def _loader(config: Config, split: str) -> Loader:
    return build_loader(config, data_parallel_rank=0, data_parallel_size=1, split=split)


if __name__ == "__main__":
    sys.exit(main())
