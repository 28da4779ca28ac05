"""The record beside a .bin/.idx pair that says what it was made from. Torch-free.

Pairs made by other tools have none and work all the same; what it would have checked is then left unchecked.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from maha_megatron.data.prepare.stage import whole_file
from maha_megatron.errors import DataError

FORMAT = 1


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
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    unigram_entropy_nats: float
    """Entropy of the tokens' frequencies: the loss of a model that knows nothing else."""
    sources_sha256: str
    """Hash over the documents' texts in order."""
    arguments: dict[str, Any]
    """How the pair was made; the same arguments need no second run."""
    format: int = FORMAT

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens


def manifest_path(prefix: str | Path) -> Path:
    """Where the manifest of a pair lies."""
    return Path(f"{prefix}.manifest.json")


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
        if tree["format"] != FORMAT:
            raise DataError(f"{path} has format {tree['format']}, this version reads {FORMAT}: preprocess again")
        return Manifest(**{field.name: tree[field.name] for field in fields(Manifest)})
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}): preprocess again, or remove it and go without"
        ) from error


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write the manifest of a pair, all or nothing."""
    with whole_file(manifest_path(prefix)) as partial:
        partial.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
