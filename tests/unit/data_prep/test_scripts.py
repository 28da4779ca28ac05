"""The three command lines, run as a user runs them."""

import hashlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece

from maha_megatron.data.manifest import read_manifest
from maha_megatron.data.pair import open_pair
from tests.support.corpora import byte_level_bpe, odd_corpus, plain_text, sentencepiece_model

SCRIPTS = Path(__file__).parents[3] / "data_prep"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a script in this process; returns its exit code, output and errors."""

    def call(script: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_from_this_machines_text_to_a_pair(run, tmp_path: Path) -> None:
    corpus, model, prefix = tmp_path / "corpus.jsonl", tmp_path / "t.model", tmp_path / "corpus"
    stages = [
        ("make_corpus.py", "--output", corpus, "--bytes", "600kB"),
        ("train_tokenizer.py", "--input", corpus, "--output", model, "--vocabulary", 512, "--sample", "300kB"),
        (
            *("preprocess.py", "--input", corpus, "--output-prefix", prefix, "--tokenizer-model", model),
            *("--tokenizer-type", "SentencePieceTokenizer", "--json-keys", "text", "--append-eod", "--workers", 1),
        ),
    ]
    for stage in stages:
        code, out, err = run(*stage)
        assert code == 0, err
        assert "done already" not in out
    manifest = read_manifest(f"{prefix}_text_document")
    documents = [json.loads(line) for line in corpus.read_text().splitlines()]
    assert manifest.documents == len(documents)
    assert 300_000 < manifest.text_bytes <= 600_000
    assert manifest.vocabulary == 512
    assert f"{manifest.unigram_entropy_nats:.3f} nats per token" in out
    record = json.loads((tmp_path / "corpus.jsonl.record.json").read_text())
    assert record["text_bytes"] == manifest.text_bytes
    assert record["digest"] == manifest.text_digest
    assert [document["source"] for document in documents] == [source for source, _ in record["files"]]

    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for stage in stages:
        code, out, _ = run(*stage)
        assert code == 0
        assert "done already" in out
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    code, out, _ = run(*stages[0], "--force")
    assert (code, "done already" in out) == (0, False)


def test_the_default_corpus_is_mixed_and_without_tests(run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("make_corpus.py", "--output", tmp_path / f"{name}.jsonl", "--bytes", "2MB")[0] == 0
    content = (tmp_path / "a.jsonl").read_bytes()
    assert content == (tmp_path / "b.jsonl").read_bytes()
    documents = [json.loads(line) for line in content.splitlines()]
    sources = [document["source"] for document in documents]
    assert sorted(sources, key=lambda source: hashlib.sha256(source.encode()).digest()) == sources
    assert sources != sorted(sources)
    assert len({document["text"] for document in documents}) == len(documents)
    assert not any("/test" in source or "/encodings/" in source for source in sources)


def test_any_folder_makes_a_corpus(run, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for number in range(5):
        (tmp_path / "own" / f"{number}.txt").write_text(f"text {number}\n")
    output = tmp_path / "own.jsonl"
    code, out, err = run("make_corpus.py", "--input", tmp_path / "own", "--output", output, "--bytes", 21)
    assert code == 0, err
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == [
        "text 0\n",
        "text 1\n",
        "text 2\n",
    ]
    assert "3 documents, 21 bytes" in out


def test_a_data_set_is_streamed(run, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    arguments = ("make_corpus.py", "--dataset", tmp_path / "set", "--output", tmp_path / "c.jsonl")
    code, _, err = run(*arguments, "--json-keys", "body")
    assert code == 0, err
    assert [json.loads(line)["text"] for line in (tmp_path / "c.jsonl").read_text().splitlines()] == ["one", "two"]
    code, _, err = run(*arguments)
    assert code == 2
    assert "has the fields body: name one by --json-keys" in err
    (tmp_path / "set" / "train.jsonl").write_text('{"body": "one"}\n{"body": "three"}\n')
    code, out, err = run(*arguments, "--json-keys", "body")
    assert (code, "done already" in out) == (0, False), err
    code, _, err = run("make_corpus.py", "--dataset", tmp_path / "none", "--output", tmp_path / "c.jsonl")
    assert code == 2
    assert "cannot be streamed" in err


def test_rows_of_a_data_set_without_text_are_counted_and_left_out(run, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(
        '{"text": "one", "n": 1}\n{"text": null, "n": 2}\n{"text": "two", "n": 3}\n'
    )
    arguments = ("make_corpus.py", "--dataset", tmp_path / "set", "--output", tmp_path / "c.jsonl")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert [json.loads(line)["text"] for line in (tmp_path / "c.jsonl").read_text().splitlines()] == ["one", "two"]
    assert "1 rows without text left out" in out
    code, _, err = run(*arguments, "--json-keys", "n")
    assert code == 2
    assert "holds no text but int" in err


def test_a_skip_imports_neither_torch_nor_megatron(run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to learn from, and some more of it\n" * 50)
    model = tmp_path / "t.model"
    stages = [
        ["make_corpus.py", "--input", tmp_path / "a.txt", "--output", tmp_path / "c.jsonl"],
        ["train_tokenizer.py", "--input", tmp_path / "a.txt", "--output", model, "--vocabulary", 290],
        [
            *("preprocess.py", "--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "p"),
            *("--tokenizer-model", model, "--workers", 1),
        ],
    ]
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "heavy = {'torch', 'megatron', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for script, *arguments in stages:
        assert run(script, *arguments)[0] == 0
        again = subprocess.run(
            [sys.executable, "-c", code, str(SCRIPTS / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert again.returncode == 0, again.stderr
        assert "done already" in again.stdout


def test_a_damaged_pair_is_not_taken_for_a_finished_one(run, tmp_path: Path) -> None:
    odd_corpus(tmp_path / "a.jsonl", 50, long_bytes=0)
    model = sentencepiece_model(tmp_path / "t.model")
    prefix = tmp_path / "p_text_document"
    words = ("preprocess.py", "--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p")
    words += ("--tokenizer-model", model, "--workers", 1)
    assert run(*words)[0] == 0
    for ending, damage in [
        ("bin", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        ("bin", lambda content: content[:-2]),
        ("idx", lambda content: content[:-3] + b"\1" + content[-2:]),
        ("checksums.npz", lambda content: content[:100]),
    ]:
        path = Path(f"{prefix}.{ending}")
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        code, out, _ = run(*words)
        assert code == 0
        assert "it is made again now" in out
        assert "done already" not in out
        assert path.read_bytes() == whole
    assert "done already" in run(*words)[1]


def test_errors_are_one_line_and_code_2(run, tmp_path: Path) -> None:
    missing = ("--input", tmp_path / "missing.jsonl")
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "bad.model").write_text("bad")
    wrong_key = ("--input", tmp_path / "a.jsonl")
    for arguments, message in [
        (("make_corpus.py", *missing, "--output", tmp_path / "c.jsonl"), "does not exist"),
        (("make_corpus.py", *wrong_key, "--output", tmp_path / "c.jsonl"), "has no field 'text' (it has: content)"),
        (("train_tokenizer.py", *missing, "--output", tmp_path / "t.model"), "does not exist"),
        (("train_tokenizer.py", *wrong_key, "--output", tmp_path / "t"), "must end in .model"),
        (
            (
                "preprocess.py",
                *wrong_key,
                "--output-prefix",
                tmp_path / "p",
                "--tokenizer-model",
                tmp_path / "bad.model",
            ),
            "is no SentencePiece model",
        ),
        (
            ("preprocess.py", *wrong_key, "--output-prefix", tmp_path / "p", "--tokenizer-model", tmp_path / "none"),
            f"the tokenizer {tmp_path / 'none'} does not exist: give its path by --tokenizer-model",
        ),
        (("make_corpus.py", "--input", tmp_path, "--output", tmp_path / "c.jsonl"), "lies in the input"),
        (("train_tokenizer.py", "--input", tmp_path, "--output", tmp_path / "t.model"), "lies in the input"),
        (
            ("preprocess.py", "--input", tmp_path, "--output-prefix", tmp_path / "p", "--tokenizer-model", "t.model"),
            "lies in the input",
        ),
    ]:
        code, _, err = run(*arguments)
        assert code == 2
        assert err.splitlines()[-1].startswith("error: ")
        assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "bad.model"]


def test_the_tokenizer_type_must_be_what_is_there(run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to learn from, and some more of it\n" * 50)
    assert (
        run("train_tokenizer.py", "--input", tmp_path / "a.txt", "--output", tmp_path / "t.model", "--vocabulary", 290)[
            0
        ]
        == 0
    )
    code, _, err = run(
        *("preprocess.py", "--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "p"),
        *("--tokenizer-model", tmp_path / "t.model", "--tokenizer-type", "HuggingFaceTokenizer"),
    )
    assert code == 2
    assert "is a SentencePieceTokenizer, not a HuggingFaceTokenizer" in err


def test_the_llama_type_begins_documents_as_megatrons_does(run, tmp_path: Path) -> None:
    """tools/preprocess_data.py appends the end to what tokenize() gives, and that begins with <s>, also for no text."""
    model, texts = io.BytesIO(), [plain_text(30, 0), "", plain_text(5, 1)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(plain_text(2000, 2).splitlines()), model_writer=model, vocab_size=50, minloglevel=2
    )
    (tmp_path / "llama.model").write_bytes(model.getvalue())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ("preprocess.py", "--input", tmp_path / "a.jsonl", "--tokenizer-model", tmp_path / "llama.model")
    package = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for name, kind in (
        ("plain", "GPTSentencePieceTokenizer"),
        ("llama", "Llama2Tokenizer"),
        ("plain", "Llama2Tokenizer"),
    ):
        code, _, err = run(*arguments, "--output-prefix", tmp_path / name, "--tokenizer-type", kind)
        assert code == 0, err
        begin = [package.bos_id()] if kind == "Llama2Tokenizer" else []
        expected = [begin + package.encode(text) for text in texts]
        pair = open_pair(tmp_path / f"{name}_text_document")
        found = [pair.document(number).tolist() for number in range(pair.documents)]
        assert found == [[*ids, package.eos_id()] if ids else [] for ids in expected]
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    arguments = ("preprocess.py", "--input", tmp_path / "empty.jsonl", "--tokenizer-model", tmp_path / "llama.model")
    code, out, err = run(*arguments, "--output-prefix", tmp_path / "e", "--tokenizer-type", "Llama2Tokenizer")
    assert (code, "1 documents, 2 tokens, no text" in out) == (0, True), err
    arguments = ("preprocess.py", "--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "r")
    own = sentencepiece_model(tmp_path / "small.model")
    code, _, err = run(*arguments, "--tokenizer-model", own, "--tokenizer-type", "Llama2Tokenizer")
    assert (code, "has no <s> to begin documents with" in err) == (2, True)


def test_preprocess_takes_data_sets_folders_and_vocabularies_with_merges(run, tmp_path: Path) -> None:
    vocab, merges = byte_level_bpe(tmp_path / "bpe")
    texts = [plain_text(20, seed) for seed in range(5)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    table = pyarrow.table({"text": [*texts, None], "other": [5] * 6})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    tokenizer = ("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab, "--merge-file", merges)
    for name, source in [
        ("set", ("--dataset", tmp_path / "set", "--licence", "MIT")),
        ("texts", ("--input", tmp_path / "texts", "--licence", "MIT", "--revision", "v2")),
        ("rows", ("--input", tmp_path / "rows.parquet")),
    ]:
        code, out, err = run("preprocess.py", *source, "--output-prefix", tmp_path / name, *tokenizer, "--workers", 2)
        assert code == 0, err
    manifests = {name: read_manifest(tmp_path / f"{name}_text_document") for name in ("set", "texts", "rows")}
    assert len({manifest.text_digest for manifest in manifests.values()}) == 1
    assert len({(tmp_path / f"{name}_text_document.bin").read_bytes() for name in manifests}) == 1
    assert [(m.sources[0].licence, m.sources[0].revision) for m in manifests.values()] == [
        ("MIT", ""),
        ("MIT", "v2"),
        ("", ""),
    ]
    assert manifests["rows"].bad_lines == {"wrong type": 1}
    assert "1 lines or files were left out, cut or damaged (1 wrong type)" in out
    rows = ("preprocess.py", "--input", tmp_path / "rows.parquet", "--output-prefix", tmp_path / "strict")
    code, _, err = run(*rows, *tokenizer, "--strict")
    assert code == 2
    assert "rows.parquet, line 6 field 'text' is no text but NoneType" in err


def test_what_a_run_with_other_partitions_left_is_removed(run, tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "small.model")
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    arguments = ("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "a", "--tokenizer-model", model)
    left = ["a_text_document.partition-1-of-3.bin", "a_text_document.partition-0-of-3.manifest.json"]
    kept = ["a_text_document2.partition-1-of-3.bin", "a_text_document.partition-notes"]
    for _ in ("a run", "done already"):
        for name in (*left, *kept):
            (tmp_path / name).write_text("x")
        for folder in ("a_text_document.partition-2-of-3.partial", "a_text_document.partial"):
            (tmp_path / folder).mkdir(exist_ok=True)
        assert run("preprocess.py", *arguments)[0] == 0
        found = {path.name for path in tmp_path.iterdir() if "parti" in path.name}
        assert found == set(kept)


def test_pairs_are_merged_split_and_inspected_by_command(run, tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "small.model")
    odd_corpus(tmp_path / "a.jsonl", 100, long_bytes=0)
    arguments = ("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "a", "--tokenizer-model", model)
    assert run("preprocess.py", *arguments)[0] == 0
    pair = tmp_path / "a_text_document"
    code, out, err = run("split.py", "--input", pair, "--output-prefix", tmp_path / "part", "--shares", 3, 1)
    assert (code, "part_0: 75 documents" in out, "part_1: 25 documents" in out) == (0, True, True), err
    parts = (tmp_path / "part_0", tmp_path / "part_1")
    assert run("merge.py", "--input", *parts, "--output-prefix", tmp_path / "whole")[0] == 0
    assert (tmp_path / "whole.idx").read_bytes() == Path(f"{pair}.idx").read_bytes()
    shown = ("--tokenizer-model", model, "--duplicates", "--check", "--plot", tmp_path, "--samples", 2)
    code, out, err = run("inspect_data.py", pair, *shown)
    assert code == 0, err
    for promised in ("100 documents", "repeat an earlier one exactly", "every byte is what", "source ", "document "):
        assert promised in out
    assert (tmp_path / "a_text_document.lengths.png").stat().st_size > 1000
    code, _, err = run("split.py", "--input", pair, "--output-prefix", tmp_path / "x", "--shares", 1, 0.0001)
    assert (code, "a part would be empty" in err) == (2, True)
