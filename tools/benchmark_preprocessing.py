"""How fast data_prep/preprocess.py is against its tokenizer alone, and how much memory its processes take.

    python tools/benchmark_preprocessing.py --input corpus.jsonl --tokenizer-model tokenizer.model --bytes 1GB

The input's documents are repeated to so many bytes. One thread then encodes 32 MB of them, which is the tokenizer's own
speed; preprocessing with as many workers as cores is to reach 90 % of that times the cores, and no process more than
400 MB of memory (resident, looked at twice a second). Exits with 1 where a goal is missed. Needs a quiet machine; the
same share by processor time instead of the clock (cpu_frac_of_tokenizer) tells what other programs cannot disturb.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from maha_megatron.data.prepare.documents import LeftOut, read_documents
from maha_megatron.data.prepare.encoding import BATCH_CHARACTERS
from maha_megatron.data.prepare.stage import parse_bytes
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.errors import MahaError, exit_code_of

ROOT = Path(__file__).resolve().parents[1]
ALONE_BYTES = 32_000_000
GOAL_FRAC = 0.9
GOAL_BYTES = 400_000_000
LOOK_INTERVAL_S = 0.5


def main() -> int:
    """Measure, print one JSON object, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, help="any text that preprocess.py reads")
    parser.add_argument("--tokenizer-model", required=True, help="as for preprocess.py")
    parser.add_argument("--bytes", type=parse_bytes, default=parse_bytes("1GB"), help="of text (default: 1GB)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: one per core")
    parser.add_argument("--memory-only", action="store_true", help="do not judge the speed: the machine is not quiet")
    options = parser.parse_args()
    return exit_code_of(lambda: judge(measure(options), options))


def judge(report: dict[str, Any], options: argparse.Namespace) -> int:
    """Print the figures; 1 where a goal is missed."""
    print(json.dumps(report, indent=2))
    slow = report["frac_of_tokenizer"] < GOAL_FRAC and not options.memory_only
    return int(slow or report["peak_process_bytes"] > GOAL_BYTES)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory, as plain data."""
    texts = [document.text for document in read_documents(options.input, left_out=LeftOut())]
    alone, alone_cpu = tokenizer_speed(options.tokenizer_model, texts)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        text_bytes = repeat(texts, corpus, options.bytes)
        elapsed_s, cpu_s, peak_bytes = preprocess(corpus, options)
    speed = text_bytes / elapsed_s
    return {
        "text_bytes": text_bytes,
        "workers": options.workers,
        "tokenizer_bytes_per_s": alone,
        "bytes_per_s": speed,
        "frac_of_tokenizer": speed / (options.workers * alone),
        "cpu_frac_of_tokenizer": text_bytes / cpu_s / alone_cpu,
        "peak_process_bytes": peak_bytes,
    }


def tokenizer_speed(path: str, texts: list[str]) -> tuple[float, float]:
    """Bytes/s, by the clock and by processor time, of one thread that encodes the batches of preprocessing."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, batches, held = load_tokenizer(path), [[]], 0
    for text in itertools.cycle(texts):
        batches[-1].append(text)
        held += len(text.encode())
        if held >= ALONE_BYTES:
            break
        if sum(map(len, batches[-1])) >= BATCH_CHARACTERS:
            batches.append([])
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for batch in batches:
        tokenizer.encode_batch(batch)
    return held / (time.perf_counter() - began_s), held / (time.process_time() - began_cpu_s)


def repeat(texts: list[str], path: Path, num_bytes: int) -> int:
    """Write the texts again and again as JSON lines; the bytes of text."""
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        for text in itertools.cycle(texts):
            stream.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= num_bytes:
                return written
    raise AssertionError("a cycle does not end")


def preprocess(corpus: Path, options: argparse.Namespace) -> tuple[float, float, int]:
    """Seconds, seconds of processor time of all processes, and the most memory that any of them took."""
    words = [sys.executable, str(ROOT / "data_prep/preprocess.py"), "--input", str(corpus)]
    words += ["--output-prefix", str(corpus.with_suffix("")), "--tokenizer-model", options.tokenizer_model]
    words += ["--workers", str(options.workers)]
    began_s, peak_bytes = time.perf_counter(), 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(LOOK_INTERVAL_S)
            for part in [watched, *_children(watched)]:
                try:
                    peak_bytes = max(peak_bytes, part.memory_info().rss)
                except psutil.Error:  # it has just ended
                    continue
    if process.returncode:
        raise MahaError(f"preprocess.py ended with {process.returncode}")
    elapsed_s, spent = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return elapsed_s, spent.ru_utime + spent.ru_stime, peak_bytes


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


if __name__ == "__main__":
    sys.exit(main())
