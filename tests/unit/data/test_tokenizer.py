import io
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece

from maha_megatron.data.prepare.tokenizer_training import evenly, stretches, train_sentencepiece
from maha_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from maha_megatron.errors import DataError
from tests.support.corpora import byte_level_bpe

ODD_TEXTS = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "   leading and trailing   ",
    "tab\tand\t\tmore\t\t\t\t\t\tthan\tfour",
    "dos\r\nline\r\nends\r",
    "nul \0 inside",
    "emoji 😀 and 👩‍👩‍👧 family, e\u0301 combining, ﬁ ligature, Ⅷ, ½, \uff21\uff22 full width",
    "the end is written </s>, the start <s>, unknown <unk>, a byte <0x41>",
    "a sparkline ▁▂▃▄▅▆▇█ ▁▁ and a lone ▁",
    "\u2585 \u2047 \ufeff \u200b \u00a0 \u3000 \u2028 \u2029",
    "def f(x):\n    if x:\n\treturn '\\n'\n        \n",
    "漢字かな交じり文 עברית العربية हिन्दी",
    "".join(map(chr, range(1, 128))),
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    folder = Path(sentencepiece.__file__).parent
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp(request.param) / "small.model"
    path.write_bytes(train_sentencepiece(stretches(texts), vocabulary=600, kind=request.param))
    return load_tokenizer(path)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert all(0 <= token < tokenizer.vocabulary for token in ids)


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_the_mark_of_a_space_is_kept_where_a_model_begins_texts_with_one(
    texts: list[str], tmp_path: Path, rule: str
) -> None:
    """As Llama's does. A model that changes texts anyway gives the package's own ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].splitlines()),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path / "dummy.model"
    path.write_bytes(model.getvalue())
    tokenizer, package = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("a\u2581b", "\u2581", "\u2581\u2581x \u2581", " \u2581 def f(x):", "x\ufdd0\u2581", "\ufb01 \u2581"):
        ids = tokenizer.encode(text)
        assert tokenizer.encode_batch([text])[0].tolist() == ids
        if rule == "identity" and "\ufdd0" not in text:
            assert tokenizer.decode(ids) == text
            assert package.decode(package.encode(text)) != text  # what it mends
        elif "\ufb01" in text or "\ufdd0" in text:
            assert ids == package.encode(text)
    assert tokenizer.encode("def f(x):") == package.encode("def f(x):")


def test_the_trained_vocabulary_suits_code(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.vocabulary == 600
    for one_piece in ("        ", ":\n", "\t\t\t"):
        assert len(tokenizer.encode(one_piece)) == 1, one_piece
    assert len(texts[0].encode()) / len(tokenizer.encode(texts[0])) > 2.5


def test_training_is_reproducible_and_the_fingerprint_tells_tokenizers_apart(texts: list[str], tmp_path: Path) -> None:
    models = [train_sentencepiece(stretches(texts), vocabulary=size, kind="bpe") for size in (500, 500, 510)]
    assert models[0] == models[1]
    fingerprints = []
    for number, model in enumerate(models):
        path = tmp_path / f"{number}.model"
        path.write_bytes(model)
        fingerprints.append(load_tokenizer(path).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_too_little_text_for_the_vocabulary_is_said() -> None:
    with pytest.raises(DataError, match=r"cannot learn 4096 pieces.*smaller --vocabulary"):
        train_sentencepiece(["a b c"], vocabulary=4096, kind="unigram")


def test_stretches_lose_nothing() -> None:
    texts = ["short\n", "x" * 9000, "line of text\n" * 1000, ""]
    pieces = list(stretches(texts))
    assert "".join(pieces) == "".join(texts)
    assert max(map(len, pieces)) <= 2000
    assert all(piece.endswith("\n") for piece in pieces if "line" in piece)


def test_a_sample_is_spread_over_the_text() -> None:
    texts = [f"{i:04d}" for i in range(1000)]
    assert list(evenly(texts, total_bytes=4000, sample_bytes=10_000)) == texts
    sample = list(evenly(texts, total_bytes=4000, sample_bytes=400))
    assert 90 <= len(sample) <= 101
    assert int(sample[-1]) > 980
    assert int(sample[50]) - int(sample[0]) > 400


def test_a_model_without_an_end_is_refused(texts: list[str], tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].splitlines()), model_writer=model, vocab_size=300, eos_id=-1, minloglevel=2
    )
    (tmp_path / "endless.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=r"has no end-of-document token.*</s>"):
        load_tokenizer(tmp_path / "endless.model")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer at .*data_prep/train_tokenizer\.py"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json and 0 \.model files"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="is no SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read as a Hugging Face tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_folder_with_one_model_is_that_model(
    tokenizer: SentencePieceTokenizer, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "m.model").write_bytes(train_sentencepiece(stretches(texts), vocabulary=500, kind="bpe"))
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(tmp_path / "m.model").fingerprint


@pytest.fixture(scope="session")
def byte_level(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A byte-level tokenizer.json whose end is <|endoftext|>."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    fast.save(str(path))
    return path


@pytest.mark.parametrize("text", [*ODD_TEXTS, "spelt out <|endoftext|> here"])
def test_hugging_face_texts_come_back_exactly(byte_level: Path, text: str) -> None:
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids


def test_a_tokenizer_travels_to_another_process(byte_level: Path, tokenizer: Tokenizer) -> None:
    text = "spelt out <|endoftext|> and </s> here"
    for original in (tokenizer, load_tokenizer(byte_level)):
        copy = pickle.loads(pickle.dumps(original))
        assert copy.encode(text) == original.encode(text)
        assert [ids.tolist() for ids in copy.encode_batch([text])] == [original.encode(text)]
        assert (copy.fingerprint, copy.end_of_document) == (original.fingerprint, original.end_of_document)


def test_no_special_token_comes_from_text_even_where_the_model_knows_its_spelling(tmp_path: Path) -> None:
    """A unigram model whose ordinary vocabulary holds </s>, as T5's does."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((character, -5.0) for character in "abc</s>")]
    fast = Fast(models.Unigram(pieces[:2] + list(dict(pieces[2:]).items()), unk_id=0))
    fast.add_special_tokens(["</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.end_of_document == 1
    for text in ("a</s>b", "</s>", "</s></s>"):
        ids = tokenizer.encode(text)
        assert 1 not in ids
        assert len(ids) == len(text)
        assert tokenizer.encode_batch([text, "abc"])[0].tolist() == ids
        assert 1 in tokenizer._backend.encode(text).ids  # what it guards against


@pytest.mark.parametrize("text", ["a\uff1c/s\uff1eb", "\uff1c\uff0fs\uff1e</s>", "</\uff53>" * 3, "a\u2603b", "\u2603"])
def test_no_special_token_comes_from_what_a_normalizer_makes_of_text(tmp_path: Path, text: str) -> None:
    """NFKC turns full-width characters into the spelling of </s>; a replacement, one character into all of it."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers

    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((character, -5.0) for character in "ab</s>")]
    fast = Fast(models.Unigram(pieces, unk_id=0))
    fast.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\u2603", "</s>")])
    fast.add_special_tokens(["</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert 1 in tokenizer._backend.encode(text).ids  # what it guards against
    ids = tokenizer.encode(text)
    assert 1 not in ids
    assert len(ids) == len(text.replace("\u2603", ""))
    assert tokenizer.encode_batch(["b", text])[1].tolist() == ids


def test_a_vocabulary_with_merges_is_a_tokenizer(texts: list[str], tmp_path: Path) -> None:
    vocab, merges = byte_level_bpe(tmp_path / "bpe")
    by_files, by_folder = load_tokenizer(vocab, merges), load_tokenizer(tmp_path / "bpe")
    assert by_files.fingerprint == by_folder.fingerprint
    assert (by_files.vocabulary, by_files.end_of_document) == (len(json.loads(Path(vocab).read_text())), 0)
    for text in [*ODD_TEXTS, "spelt out <|endoftext|> here"]:
        assert by_files.decode(by_files.encode(text)) == text
        assert by_files.end_of_document not in by_files.encode(text)
    with pytest.raises(DataError, match="no vocabulary and merges of a byte-level BPE"):
        load_tokenizer(merges, vocab)


def test_a_hugging_face_folder_names_its_own_end(byte_level: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(byte_level), eos_token="<|endoftext|>").save_pretrained(tmp_path / "a")
    folder, bare = load_tokenizer(tmp_path / "a"), load_tokenizer(byte_level)
    assert isinstance(folder, HuggingFaceTokenizer)
    assert (folder.vocabulary, folder.end_of_document) == (bare.vocabulary, bare.end_of_document) == (500, 0)
    assert folder.fingerprint == bare.fingerprint
    PreTrainedTokenizerFast(tokenizer_file=str(byte_level)).save_pretrained(tmp_path / "b")
    with pytest.raises(DataError, match=r"has no end-of-document token: set eos_token"):
        load_tokenizer(tmp_path / "b")


def test_a_missing_package_names_the_extra(byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"pip install 'maha-megatron\[hf\]'"):
        load_tokenizer(byte_level)
