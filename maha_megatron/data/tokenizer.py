"""Tokenizers behind one small protocol. Torch-free: data preparation uses it before torch is loaded."""

import hashlib
from pathlib import Path
from typing import Protocol

from maha_megatron.errors import DataError

LOWER_ONE_EIGHTH = "\u2581"
"""The character SentencePiece writes for a space; text that holds it is encoded around it (see below)."""
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

    def decode(self, ids: list[int]) -> str: ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a SentencePiece .model file, a Hugging Face folder or a tokenizer.json.

    Raises:
        DataError: Nothing usable is there, a package is missing, or there is no end-of-document token.
    """
    path = Path(path)
    if not str(path) or not path.exists():
        raise DataError(
            f"no tokenizer at {str(path)!r}: give a SentencePiece .model file, a tokenizer.json or a folder that"
            " holds one (data.tokenizer; data_prep/train_tokenizer.py makes one)"
        )
    if path.is_dir():
        if (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file():
            return HuggingFaceTokenizer(path)
        models = sorted(path.glob("*.model"))
        if len(models) != 1:
            raise DataError(f"{path} holds no tokenizer.json and {len(models)} .model files; name the one to use")
        return SentencePieceTokenizer(models[0])
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)


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
        if self.end_of_document < 0:
            raise DataError(
                f"{path} has no end-of-document token (it was trained with eos_id=-1): train it with an </s> piece,"
                " for example with data_prep/train_tokenizer.py"
            )
        self.fingerprint = f"SentencePieceTokenizer:{hashlib.sha256(content).hexdigest()}"
        # With byte fallback the character that stands for a space can itself be kept: as its three bytes.
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in LOWER_ONE_EIGHTH.encode()]
        self._lower_one_eighth_ids = byte_ids if all(map(self._model.is_byte, byte_ids)) else None

    def encode(self, text: str) -> list[int]:
        if self._lower_one_eighth_ids is None or LOWER_ONE_EIGHTH not in text:
            return self._model.encode(text)
        ids: list[int] = []
        for number, part in enumerate(text.split(LOWER_ONE_EIGHTH)):
            ids += (self._lower_one_eighth_ids if number else []) + self._model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceTokenizer:
    """A Hugging Face fast tokenizer, from a folder or a bare tokenizer.json; a document ends with its eos token."""

    def __init__(self, path: Path):
        try:
            from transformers import AutoTokenizer, PreTrainedTokenizerFast
        except ImportError as error:
            raise DataError(
                f"{path} is a Hugging Face tokenizer and needs transformers: pip install 'maha-megatron[hf]'"
            ) from error
        try:
            if path.is_dir():
                model = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            else:
                model = PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # transformers raises many kinds for a damaged file
            raise DataError(f"{path} cannot be read as a Hugging Face tokenizer ({error})") from error
        if not model.is_fast:
            raise DataError(f"{path} holds no fast tokenizer: save it with tokenizer.json (save_pretrained)")
        ids = model.get_vocab()
        self.vocabulary = max(ids.values()) + 1
        self.end_of_document = _end_of_document(path, model.eos_token_id, ids)
        self._backend = model.backend_tokenizer
        self._backend.encode_special_tokens = True  # a document that spells out a special token keeps it as characters
        self._backend.no_truncation()
        self._backend.no_padding()
        identity = f"{self._backend.to_str()}|{self.end_of_document}"
        self.fingerprint = f"HuggingFaceTokenizer:{hashlib.sha256(identity.encode()).hexdigest()}"

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _end_of_document(path: Path, declared: int | None, ids: dict[str, int]) -> int:
    if declared is not None:
        return declared
    if path.is_file():  # a bare tokenizer.json does not say which token is eos
        for token in KNOWN_ENDS:
            if token in ids:
                return ids[token]
    raise DataError(
        f"{path} has no end-of-document token: set eos_token in its tokenizer_config.json"
        f" (a bare tokenizer.json must hold one of {', '.join(KNOWN_ENDS)})"
    )
