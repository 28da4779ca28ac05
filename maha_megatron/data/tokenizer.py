"""Tokenizers behind one small protocol. Torch-free: data preparation uses it before torch is loaded."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maha_megatron.data.locality import is_cut_at_spaces, pieces_keep_to_cuts
from maha_megatron.errors import DataError

LOWER_ONE_EIGHTH = "\u2581"
"""The character SentencePiece writes for a space; text that holds it is encoded with a stand-in for it."""
STAND_IN = "\ufdd0"
"""No character and in no text, and of as many UTF-8 bytes."""
KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to token ids and back, without adding or dropping anything."""

    vocabulary: int
    """Token ids run from 0 to vocabulary - 1."""
    end_of_document: int
    """The id that ends a document; never produced by encode."""
    fingerprint: str
    """Hash of what determines the ids: equal exactly when two tokenizers are the same."""

    def encode(self, text: str) -> list[int]: ...

    def is_local(self, text: str) -> bool:
        """Whether the ids of this text depend on what is around them alone, up to the nearest spaces."""

    def encode_on(self, text: str) -> np.ndarray:
        """The ids of a text, int32, that goes on after another: without what the tokenizer puts before a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several texts, int32, by the fastest way the tokenizer's package has."""

    def decode(self, ids: list[int]) -> str: ...


def load_tokenizer(path: str | Path, merges: str | Path | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: A SentencePiece .model file, a Hugging Face folder, a tokenizer.json, or the vocabulary of a byte-level
            BPE, of which a folder may hold one vocab.json and one merges.txt.
        merges: The merges that belong to such a vocabulary.

    Raises:
        DataError: Nothing usable is there, a package is missing, or there is no end-of-document token.
    """
    path = Path(path)
    if not str(path) or not path.exists():
        raise DataError(
            f"no tokenizer at {str(path)!r}: give a SentencePiece .model file, a tokenizer.json or a folder that"
            " holds one (data.tokenizer; data_prep/train_tokenizer.py makes one)"
        )
    if merges is not None:
        return HuggingFaceTokenizer(path, byte_level_bpe(path, Path(merges)))
    if path.is_dir():
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file() and not _is_described(path):
            return HuggingFaceTokenizer(path, byte_level_bpe(path / "vocab.json", path / "merges.txt"))
        if _is_described(path):
            return HuggingFaceTokenizer(path)
        models = sorted(path.glob("*.model"))
        if len(models) != 1:
            raise DataError(f"{path} holds no tokenizer.json and {len(models)} .model files; name the one to use")
        return SentencePieceTokenizer(models[0])
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)


def _is_described(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()


class SentencePieceTokenizer:
    """A SentencePiece model; a document ends with its eos token, `</s>`."""

    def __init__(self, path: Path):
        import sentencepiece

        try:
            content = path.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path} is no SentencePiece model ({error})") from error
        self.vocabulary = self._model.get_piece_size()
        self.end_of_document = self._model.eos_id()
        self.begin_of_document = self._model.bos_id()  # below 0 where it has none
        if self.end_of_document < 0:
            raise DataError(
                f"{path} has no end-of-document token (it was trained with eos_id=-1): train it with an </s> piece,"
                " for example with data_prep/train_tokenizer.py"
            )
        self.fingerprint = f"SentencePieceTokenizer:{hashlib.sha256(content).hexdigest()}"
        # With byte fallback, a character that no piece holds is three tokens, and what surrounds it does not matter.
        self._bytes = [
            [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
            for character in (STAND_IN, LOWER_ONE_EIGHTH)
        ]
        self._has_bytes = all(self._model.is_byte(token) for tokens in self._bytes for token in tokens)
        # The scores of a BPE are its pieces' places; those of a unigram model are logarithms, which it adds up.
        every = list(range(self.vocabulary))
        self._is_local = all(score.is_integer() for score in self._model.get_score(every)) and pieces_keep_to_cuts(
            self._model.id_to_piece(every)
        )

    def encode(self, text: str) -> list[int]:
        if not self._has_bytes or LOWER_ONE_EIGHTH not in text:
            return self._model.encode(text)
        ids = np.array(self._model.encode(text.replace(LOWER_ONE_EIGHTH, STAND_IN)), dtype=np.int32)
        found, kept = self._bytes
        first, second, third = (ids[place : ids.size - 2 + place] == token for place, token in enumerate(found))
        for start in np.flatnonzero(first & second & third):
            ids[start : start + 3] = kept
        exact = ids.tolist()
        # else the model normalises text; then it is encoded as by the package, where the character is a space
        return exact if self._model.decode(exact) == text else self._model.encode(text)

    def is_local(self, text: str) -> bool:
        return self._is_local and LOWER_ONE_EIGHTH not in text  # with it, all of the text is decoded as a proof

    def encode_on(self, text: str) -> np.ndarray:
        before = self._model.encode(STAND_IN) if self._has_bytes else []
        ids = self.encode(STAND_IN + text if before else text)
        return np.array(ids[len(before) :], dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not self._has_bytes or not any(LOWER_ONE_EIGHTH in text for text in texts):
            return [np.array(ids, dtype=np.int32) for ids in self._model.encode(list(texts), num_threads=1)]
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceTokenizer:
    """A tokenizer of Hugging Face's fast kind; a document ends with its eos token.

    Text that spells out a special token keeps it as characters: the package matches none in it, and where a model
    knows the token as an ordinary piece too, the spelling, or what the model normalises to it, is encoded in two parts,
    cut after its first character. A single character that makes a special token is left out.

    Args:
        path: A folder or a tokenizer.json.
        backend: The tokenizer itself, where it was made from other files.
    """

    def __init__(self, path: Path, backend: Any = None):
        declared_end, special = None, ()
        if backend is None:
            backend, declared_end, special = _load_fast(path)
        self._backend = backend
        ids = backend.get_vocab(with_added_tokens=True)
        self.vocabulary = max(ids.values()) + 1
        self.end_of_document = _end_of_document(path, declared_end, ids)
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        described = backend.to_str()
        self._is_local = is_cut_at_spaces(json.loads(described))
        identity = f"{described}|{self.end_of_document}"
        self.fingerprint = f"HuggingFaceTokenizer:{hashlib.sha256(identity.encode()).hexdigest()}"
        self._control = np.zeros(self.vocabulary, dtype=bool)
        self._control[[self.end_of_document, *special]] = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # not part of what the package pickles

    def encode(self, text: str) -> list[int]:
        ids = np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        return self._without_control(text, ids).tolist()

    def is_local(self, text: str) -> bool:
        return self._is_local

    def encode_on(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            self._without_control(text, np.array(part.ids, dtype=np.int32))
            for text, part in zip(texts, encoded, strict=True)
        ]

    def _without_control(self, text: str, ids: np.ndarray) -> np.ndarray:
        if not self._control[ids].any():
            return ids
        cuts = {0, len(text)}
        while True:
            kept, known = [], len(cuts)
            for begin, end in pairwise(sorted(cuts)):
                encoded = self._backend.encode(text[begin:end], add_special_tokens=False)
                for token, (first, last) in zip(encoded.ids, encoded.offsets, strict=True):
                    if not self._control[token]:
                        kept.append(token)
                    elif last - first > 1:
                        cuts.add(begin + first + 1)
            if len(cuts) == known:
                return np.array(kept, dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def byte_level_bpe(vocab: Path, merges: Path) -> Any:
    """A byte-level BPE as GPT-2 has it, from its two files.

    Raises:
        DataError: A file is missing or damaged, or the package is.
    """
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers
    except ImportError as error:
        raise _needs_package(vocab) from error
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # tokenizers raises the plain class
        raise DataError(f"{vocab} and {merges} are no vocabulary and merges of a byte-level BPE ({error})") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in KNOWN_ENDS if backend.token_to_id(token) is not None])
    return backend


def _load_fast(path: Path) -> tuple[Any, int | None, Iterable[int]]:
    """The tokenizer of a folder or tokenizer.json, its declared end and its special tokens, unknown left out."""
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise _needs_package(path) from error
    try:
        if path.is_dir():
            model = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        else:
            model = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise DataError(f"{path} cannot be read as a Hugging Face tokenizer ({error})") from error
    if not model.is_fast:
        raise DataError(f"{path} holds no fast tokenizer: save it with tokenizer.json (save_pretrained)")
    special = {*model.all_special_ids, *(i for i, token in model.added_tokens_decoder.items() if token.special)}
    return model.backend_tokenizer, model.eos_token_id, special - {model.unk_token_id}


def _needs_package(path: Path) -> DataError:
    return DataError(f"{path} is a Hugging Face tokenizer and needs transformers: pip install 'maha-megatron[hf]'")


def _end_of_document(path: Path, declared: int | None, ids: dict[str, int]) -> int:
    if declared is not None:
        return declared
    if path.is_file() or not _is_described(path):  # bare files do not say which token is eos
        for token in KNOWN_ENDS:
            if token in ids:
                return ids[token]
    raise DataError(
        f"{path} has no end-of-document token: set eos_token in its tokenizer_config.json"
        f" (a bare tokenizer.json must hold one of {', '.join(KNOWN_ENDS)})"
    )
