"""Long documents are encoded in pieces whose ids are those of the whole."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from maha_megatron.data.prepare import encoding
from maha_megatron.data.prepare.blocks import Block, Position
from maha_megatron.data.prepare.encoding import Encoder
from maha_megatron.data.prepare.tokenizer_training import stretches, train_sentencepiece
from maha_megatron.data.tokenizer import load_tokenizer
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
