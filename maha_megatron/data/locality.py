"""Whether a text may be cut before a single space without its ids changing. Unknown means no.

Looking at what is around a cut proves nothing by itself: where a piece may run over it, what happens there can depend
on a chain of pieces from far away.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

OVER_A_CUT = re.compile("[^\u2581 ][\u2581 ]")
"""What a piece holds that can run over a cut; a space is written as U+2581."""
DROP_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
SPLIT_CHARACTERS = ("Digits", "Punctuation")
"""Look at single characters, and leave a later part of a sequence to split at spaces."""
SPLITTING_PATTERNS = (
    r"\s",
    r"\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"  # Llama 3
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"  # Qwen 2
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
"""Of none can a match go on over a cut."""
HARMLESS_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Prepend")


def pieces_keep_to_cuts(pieces: Iterable[str]) -> bool:
    """Whether no piece can run over a cut, so that no merge of a BPE does."""
    return not any(OVER_A_CUT.search(piece) for piece in pieces)


def is_cut_at_spaces(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a Hugging Face tokenizer, as its tokenizer.json describes it, encodes what is around a cut apart."""
    model, splitter = tokenizer["model"], _first_splitter(tokenizer["pre_tokenizer"])
    if model["type"] == "Unigram" or not _is_harmless(tokenizer["normalizer"]):
        return False
    added = [token for token in tokenizer["added_tokens"] if not token["special"]]  # special ones are never matched
    if any(token["rstrip"] or re.search(r"\S\s|\s\S", token["content"]) for token in added):
        return False
    if splitter is None or splitter["type"] == "Metaspace":
        return model["type"] == "BPE" and pieces_keep_to_cuts(model["vocab"])
    return _splits(splitter)


def _first_splitter(part: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What first looks at more than single characters."""
    while part is not None and part["type"] == "Sequence":
        part = next((inner for inner in part["pretokenizers"] if inner["type"] not in SPLIT_CHARACTERS), None)
    return part


def _splits(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Split":
        is_known = part["pattern"].get("Regex") in SPLITTING_PATTERNS
        return is_known and part["behavior"] == "Isolated" and not part["invert"]
    return part["type"] in DROP_SPACES or (part["type"] == "ByteLevel" and part.get("use_regex", True))


def _is_harmless(part: Mapping[str, Any] | None) -> bool:
    """Whether a normalizer leaves spaces where they are."""
    if part is None or part["type"] in HARMLESS_NORMALIZERS:
        return True
    if part["type"] == "Sequence":
        return all(map(_is_harmless, part["normalizers"]))
    return part["type"] == "Replace" and (part["pattern"], part["content"]) == ({"String": " "}, "\u2581")
