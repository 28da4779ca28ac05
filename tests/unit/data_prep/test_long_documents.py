"""Long documents are encoded in pieces whose ids are those of the whole."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as tokenizers_package
from tokenizers import Regex, models, pre_tokenizers

from maha_megatron.data.locality import SPLITTING_PATTERNS
from maha_megatron.data.prepare import encoding
from maha_megatron.data.prepare.blocks import Block, Position
from maha_megatron.data.prepare.encoding import Encoder
from maha_megatron.data.prepare.tokenizer_training import stretches, train_sentencepiece
from maha_megatron.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from tests.support.corpora import ODD_TEXTS, byte_level_bpe, plain_text, sentencepiece_model, settings_for

ODD = "".join(text.replace("\ud83d", "").replace("\u2581", "") for text in ODD_TEXTS)
TEXT = "".join(plain_text(40 + n, n) + ODD + "  \n\n   x.\n'tis it's  \n" for n in range(60))


def tokenizers(folder: Path) -> dict[str, object]:
    """Of every kind that is cut, and a unigram model, which adds scores up over the whole text."""
    lines = plain_text(20_000, 0).splitlines()
    own = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    own |= {"remove_extra_whitespaces": False, "vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **own)
    (folder / "llama.model").write_bytes(model.getvalue())
    (folder / "unigram.model").write_bytes(
        train_sentencepiece(stretches([plain_text(3000, n) for n in range(9)]), vocabulary=330, kind="unigram")
    )
    vocabulary, merges = byte_level_bpe(folder / "bpe")
    return {
        "own": load_tokenizer(sentencepiece_model(folder / "own.model")),
        "llama": load_tokenizer(folder / "llama.model"),
        "bpe": load_tokenizer(vocabulary, merges),
        "unigram": load_tokenizer(folder / "unigram.model"),
    }


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small pieces; what was encoded as one."""
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 1500)
    monkeypatch.setattr(encoding, "SEARCHED_CHARACTERS", 600)
    monkeypatch.setattr(encoding, "PROVED_AROUND", 300)
    ends, found = Encoder._end_of_piece, []

    def end_of_piece(self, text: str, begin: int) -> int:
        end = ends(self, text, begin)
        found.append(text[begin:end])
        return end

    monkeypatch.setattr(Encoder, "_end_of_piece", end_of_piece)
    return found


@pytest.mark.parametrize("name", ["own", "llama", "bpe", "unigram"])
def test_the_ids_of_a_long_document_are_those_of_the_whole(tmp_path: Path, pieces: list[str], name: str) -> None:
    tokenizer = tokenizers(tmp_path)[name]
    encoder = Encoder(tokenizer, settings_for("", prepend_begin=False), ["text"], batched=True)
    texts = ("short", TEXT, "end", "x" * 4000, "a\u2581b " * 900 if name != "bpe" else "")
    block = Block("a", "a", 0, Position(), texts=texts, names=tuple("abcde"))
    (found,) = encoder.encode(block)
    expected = [[*ids, tokenizer.end_of_document] if ids else [] for ids in map(tokenizer.encode, texts)]
    assert found.ids.tolist() == [token for ids in expected for token in ids]
    assert found.lengths.tolist() == list(map(len, expected))
    if name == "unigram":
        assert not pieces
    else:
        assert "".join(pieces) == TEXT + "x" * 4000  # the latter has no place to cut
        assert len(pieces) > 10
        assert max(map(len, pieces[:-1])) <= 3000


def over_spaces(kind: str, folder: Path) -> Tokenizer:
    """A BPE with a piece that runs over a space or a line's end, of which only the place in a chain tells the use."""
    if kind == "sentencepiece":
        own = {"model_type": "bpe", "byte_fallback": True, "split_by_whitespace": False, "minloglevel": 2}
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["b a a b a a a a"] * 9), model_writer=model, vocab_size=264, **own
        )
        (folder / "over.model").write_bytes(model.getvalue())
        return load_tokenizer(folder / "over.model")
    space, end = ("\u2581", "\n") if kind == "metaspace" else ("\u0120", "\u010a")
    pieces = ["<|endoftext|>", "a", "b", space, end, f"{end}a", f"{end}a{end}a", f"{space}a", f"{space}a{space}a"]
    merges = [(end, "a"), (f"{end}a", f"{end}a"), (space, "a"), (f"{space}a", f"{space}a")]
    backend = tokenizers_package.Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = {
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="never"),
        "no regex": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "unknown regex": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s?\p{L}+\s"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }[kind]
    return HuggingFaceTokenizer(folder, backend)


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "no regex", "unknown regex"])
def test_pieces_that_run_over_spaces_leave_the_ids_those_of_the_whole(
    tmp_path: Path, pieces: list[str], kind: str
) -> None:
    tokenizer = over_spaces(kind, tmp_path)
    encoder = Encoder(tokenizer, settings_for("", append_end=False), ["text"], batched=False)
    texts = [f"b{before}{join}a" + f"{join}a" * 4000 for join in (" ", "\n") for before in ("", "a", "aa", f"{join}b")]
    (found,) = encoder.encode(Block("a", "a", 0, Position(), texts=tuple(texts), names=tuple(texts)))
    assert found.ids.tolist() == [token for text in texts for token in tokenizer.encode(text)]


def test_tokenizers_that_split_at_spaces_are_known(tmp_path: Path) -> None:
    llama_3 = next(pattern for pattern in SPLITTING_PATTERNS if "{1,3}" in pattern)
    byte_level = pre_tokenizers.ByteLevel(use_regex=False)
    for splitter, added, known in (
        (pre_tokenizers.ByteLevel(), "xy", True),
        (pre_tokenizers.ByteLevel(), "x y", False),
        (pre_tokenizers.Whitespace(), "  ", True),
        (pre_tokenizers.Metaspace(), "x", True),
        (None, "x", True),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(llama_3), "isolated"), byte_level]), "x", True),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]), "x", True),
        (pre_tokenizers.Sequence([byte_level, pre_tokenizers.Whitespace()]), "x", False),
        (pre_tokenizers.Split(" ", "merged_with_previous"), "x", False),
    ):
        backend = tokenizers_package.Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1, "\u2581a": 2}, []))
        backend.add_tokens([added])
        if splitter is not None:
            backend.pre_tokenizer = splitter
        assert HuggingFaceTokenizer(tmp_path, backend).is_local("") == known, (splitter, added)


def test_a_tokenizer_that_looks_far_is_not_cut(tmp_path: Path, pieces: list[str]) -> None:
    class Counting:
        """Gives each text's length as an id: nothing of it is local."""

        vocabulary, end_of_document = 60_000, 0

        def is_local(self, text: str) -> bool:
            return True

        def encode(self, text: str) -> list[int]:
            return [len(text)]

        def encode_on(self, text: str) -> np.ndarray:
            return np.int32(self.encode(text))

    encoder = Encoder(Counting(), settings_for("", append_end=False), ["text"], batched=False)
    (found,) = encoder.encode(Block("a", "a", 0, Position(), texts=(TEXT,), names=("a",)))
    assert found.ids.tolist() == [len(TEXT)]
