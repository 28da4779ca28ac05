"""Corpora with everything that is odd, tokenizers for them, and what Megatron's own builder makes of them."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from maha_megatron.data.indexed import DType, IndexedDatasetBuilder
from maha_megatron.data.prepare.blocks import LONGEST_BYTES, read_blocks
from maha_megatron.data.prepare.encode import Output, write_pairs
from maha_megatron.data.prepare.encoding import EncodingSettings
from maha_megatron.data.prepare.inputs import list_inputs
from maha_megatron.data.prepare.tokenizer_training import stretches, train_sentencepiece

WORDS = "the of model to learn scale token in window is block attention for row by key sum with path 0 1 42 {} () ="
ODD_TEXTS = [
    "",
    "x",
    " ",
    "\n",
    "a\tb\r\n\0 \x7f",
    "dos\r\nline\r\nends\r\n",
    "nul \0 inside \0\0",
    "emoji 😀 👩‍👩‍👧 e\u0301 ﬁ Ⅷ \ufeff \u2028 漢字 עברית",
    "</s> <s> <unk> <pad> <|endoftext|> <0x41> and </s></s>",
    "<|endoftext|>",
    "</s>",
    "▁▁ lower one eighth ▁",
    "a lone \ud83d surrogate",
]
BAD_LINES = [
    (b'{"text": "invalid \xff\xfe utf-8"}', "not UTF-8"),
    (b'{"text": "no end', "no JSON"),
    (b"no json at all", "no JSON"),
    (b'{"body": "another key"}', "missing field"),
    (b'["text"]', "missing field"),
    (b'{"text": 5}', "wrong type"),
    (b'{"text": null}', "wrong type"),
    (b'{"text": ["a", "b"]}', "wrong type"),
]


def plain_text(words: int, seed: int) -> str:
    """A text of so many words, some lines long."""
    random = np.random.default_rng(seed)
    chosen = random.choice(WORDS.split(), words).tolist()
    return "".join(word + ("\n" if number % 11 == 10 else " ") for number, word in enumerate(chosen))


def odd_corpus(path: Path, documents: int, *, seed: int = 0, long_bytes: int = 1_000_000) -> tuple[list[str], dict]:
    """Write JSON lines of which about one in ten is odd, one in a hundred is no document, and three are long.

    Returns:
        The texts that are documents, in order, and how many lines of each bad kind there are.
    """
    random = np.random.default_rng(seed)
    texts: list[str] = []
    bad: dict[str, int] = {}
    with path.open("wb") as stream:
        while len(texts) < documents:
            draw = random.random()
            if draw < 0.01:
                line, kind = BAD_LINES[random.integers(len(BAD_LINES))]
                bad[kind] = bad.get(kind, 0) + 1
                stream.write(line + b"\n")
                continue
            if draw < 0.1:
                text = ODD_TEXTS[random.integers(len(ODD_TEXTS))]
            elif long_bytes and len(texts) in (documents // 4, documents // 2, 3 * documents // 4):
                text = (plain_text(2000, len(texts)) * (long_bytes // 8000))[:long_bytes]
            else:
                text = plain_text(int(random.integers(1, 60)), len(texts))
            texts.append(text)
            ending = b"\r\n" if random.random() < 0.1 else b"\n"
            stream.write(
                json.dumps({"text": text}, ensure_ascii=bool(random.random() < 0.5) or "\ud83d" in text).encode()
            )
            stream.write(ending)
    return texts, bad


def sentencepiece_model(path: Path) -> str:
    """A small SentencePiece model."""
    texts = [plain_text(3000, seed) for seed in range(20)]
    path.write_bytes(train_sentencepiece(stretches(texts), vocabulary=500, kind="bpe"))
    return str(path)


def byte_level_bpe(folder: Path) -> tuple[str, str]:
    """vocab.json and merges.txt of a small byte-level BPE whose end is <|endoftext|>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator([plain_text(3000, seed) for seed in range(20)], trainer)
    folder.mkdir(exist_ok=True)
    fast.model.save(str(folder))
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def megatron_pair(
    prefix: Path, texts: Iterable[str], tokenizer: str, merges: str | None = None, *, append_end: bool = True
) -> None:
    """What Megatron's tools/preprocess_data.py writes: one document after another through its own builder.

    The ids come from sentencepiece or transformers themselves; no code of ours stands between the text and the bytes.
    """
    encode, end, vocabulary = _sentencepiece_itself(tokenizer) if merges is None else _gpt2_itself(tokenizer)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocabulary))
    for text in texts:
        ids = encode(text.encode("utf-8", "replace").decode())
        lengths = [len(ids)] if ids else []
        if ids and append_end:
            ids.append(end)
            lengths[-1] += 1
        builder.add_document(np.array(ids), lengths)
    builder.finalize(f"{prefix}.idx")


def _sentencepiece_itself(model: str) -> tuple[Callable[[str], list[int]], int, int]:
    """Text to ids, the end's id and the size of the vocabulary, as Megatron's SentencePieceTokenizer has them.

    One thing differs from the package: it reads the character that it writes for a space as one, and we keep it, as the
    three bytes that it is.
    """
    from sentencepiece import SentencePieceProcessor

    plain = SentencePieceProcessor(model_file=model)
    kept = [plain.piece_to_id(name) for name in ("<0xE2>", "<0x96>", "<0x81>")]

    def encode(text: str) -> list[int]:
        first, *rest = map(plain.encode_as_ids, text.split("\u2581"))
        return first + [token for part in rest for token in (*kept, *part)]

    return encode, plain.eos_id(), plain.get_piece_size()


def _gpt2_itself(vocab: str) -> tuple[Callable[[str], list[int]], int, int]:
    """As _sentencepiece_itself, of Megatron's GPT2BPETokenizer, which looks for no control tokens in text either."""
    from transformers import GPT2TokenizerFast

    plain = GPT2TokenizerFast.from_pretrained(str(Path(vocab).parent), local_files_only=True)

    def encode(text: str) -> list[int]:
        return plain(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    return encode, plain.eos_token_id, len(plain)


def settings_for(tokenizer: str, merges: str | None = None, **changes) -> EncodingSettings:
    """Settings of a preprocessing run."""
    values = {"append_end": True, "strict": False, "longest_bytes": LONGEST_BYTES}
    return EncodingSettings(tokenizer=tokenizer, merges=merges, **(values | changes))


def write_inputs(inputs: Sequence[Path], prefix: Path, settings: EncodingSettings, **changes):
    """Preprocess files in this process; the manifest. `advance` is called with the spool of the pair."""
    files = list_inputs(list(map(str, inputs)))
    values = {"workers": 1, "revisions": {}, "say": lambda text: None}
    values |= changes
    advance = values.pop("advance", lambda spool: None)
    (manifest,) = write_pairs(
        lambda start: read_blocks(files, ["text"], start, longest_bytes=settings.longest_bytes),
        [Output("text", Path(prefix), values.pop("arguments", {"append_eod": settings.append_end}))],
        settings=settings,
        advance=lambda spools: advance(*spools),
        **values,
    )
    return manifest


def pair_bytes(prefix: Path) -> tuple[bytes, bytes]:
    """The content of a pair."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
