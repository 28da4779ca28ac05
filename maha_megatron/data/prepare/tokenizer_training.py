"""Training a lossless SentencePiece tokenizer.

Nothing is normalised, stripped or prefixed, and bytes stand in for rare characters, so decode(encode(text)) == text.
SentencePiece sees whole stretches of text rather than lines, and pieces may mix kinds of characters: so a line's end
joins what comes before it (":\\n"), and a run of spaces is one piece. Tabs are user-defined because SentencePiece
uses the tab as its own mark while training.
"""

import io
from collections.abc import Iterable, Iterator

from maha_megatron.errors import DataError

STRETCH_CHARACTERS = 2000
THREADS = 4
"""Fixed, since the order in which threads' sums are added is part of the result."""
TABS = ["\t", "\t\t", "\t\t\t", "\t\t\t\t"]


def train_sentencepiece(pieces_of_text: Iterable[str], *, vocabulary: int, kind: str) -> bytes:
    """Train a tokenizer.

    Args:
        pieces_of_text: What to learn from, in stretches of bounded length.
        vocabulary: Token ids, the 256 bytes, </s> and the unknown piece included.
        kind: "bpe" or "unigram".

    Returns:
        The content of the .model file.

    Raises:
        DataError: There is too little text for the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces_of_text),
            model_writer=model,
            vocab_size=vocabulary,
            model_type=kind,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            user_defined_symbols=TABS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=THREADS,
            max_sentence_length=4 * STRETCH_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece cannot learn {vocabulary} pieces from this text: give more text or a smaller --vocabulary"
            f" ({' '.join(str(error).split())})"
        ) from error
    return model.getvalue()


def stretches(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut into stretches of about STRETCH_CHARACTERS, at line ends where there are any."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + STRETCH_CHARACTERS
            line_end = text.rfind("\n", start, end) + 1
            end = line_end if line_end > start and end < len(text) else end
            yield text[start:end]
            start = end


def evenly(texts: Iterable[str], *, total_bytes: int, sample_bytes: int) -> Iterator[str]:
    """A share sample_bytes / total_bytes of the texts, spread evenly over them.

    Args:
        texts: In order.
        total_bytes: About how many bytes they have together.
        sample_bytes: About how many to keep; never many more.
    """
    share = min(1.0, sample_bytes / max(total_bytes, 1))
    seen_bytes = kept_bytes = 0
    for text in texts:
        size = len(text.encode("utf-8", "replace"))
        seen_bytes += size
        if kept_bytes + size <= share * seen_bytes + 1 and kept_bytes < sample_bytes:
            kept_bytes += size
            yield text
