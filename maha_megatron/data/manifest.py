"""The record beside a .bin/.idx pair that says what it was made from. Torch-free.

Pairs made by other tools have none and work all the same; what it would have checked is then left unchecked.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maha_megatron.data.writing import write_whole
from maha_megatron.errors import DataError

FORMAT = 2
_READ_FORMATS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """What one input of a pair was."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    digest: str
    """TextDigest of its documents' texts in order."""
    licence: str = ""
    revision: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `<prefix>.manifest.json` says about `<prefix>.bin` and `<prefix>.idx`."""

    tokenizer_fingerprint: str
    vocabulary: int
    """Token ids the tokenizer can produce."""
    end_of_document: int
    """The tokenizer's end-of-document id."""
    end_appended: bool
    """Whether every document ends with it."""
    documents: int
    tokens: int
    """Tokens of all documents, ends included."""
    text_bytes: int | None
    """UTF-8 bytes of the documents' text; None where only part of a pair's documents were taken over."""
    unigram_entropy_nats: float
    """Entropy of the tokens' frequencies: the loss of a model that knows nothing else."""
    text_digest: str
    """Stands for the documents' texts in order: a TextDigest, or of format 1 a SHA-256."""
    sources: tuple[SourceRecord, ...] = ()
    """The inputs, in order."""
    bad_lines: dict[str, int] = field(default_factory=dict)
    """Lines, rows and files that gave no document, by reason."""
    index_sha256: str = ""
    """Hash of the .idx; empty: unchecked, as in format 1."""
    checksums_sha256: str = ""
    """Hash of the .checksums.npz; empty: there is none, as in format 1."""
    arguments: dict[str, Any]
    """How the pair was made; the same arguments need no second run."""
    format: int = FORMAT

    @property
    def bytes_per_token(self) -> float | None:
        """None also where there is no text."""
        return self.text_bytes / self.tokens if self.text_bytes and self.tokens else None


def manifest_path(prefix: str | Path) -> Path:
    """Where the manifest of a pair lies."""
    return Path(f"{prefix}.manifest.json")


def bad_lines_path(prefix: str | Path) -> Path:
    """Where the lines that gave no document are listed, if there are any."""
    return Path(f"{prefix}.bad_lines.jsonl")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a pair; None where the pair has none.

    Raises:
        DataError: The file is damaged or of another format.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] not in _READ_FORMATS:
            raise DataError(f"{path} has format {tree['format']}, this version reads {FORMAT}: preprocess again")
        if tree["format"] == 1:
            tree["text_digest"] = tree.pop("sources_sha256")
        sources = tuple(SourceRecord(**source) for source in tree.pop("sources", ()))
        return Manifest(**tree, sources=sources)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}): preprocess again, or remove it and go without"
        ) from error


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write the manifest of a pair, all or nothing."""
    write_whole(manifest_path(prefix), (json.dumps(asdict(manifest), indent=2) + "\n").encode())
