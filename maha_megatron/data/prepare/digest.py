"""One number that stands for texts in order, and that joins: the digest of a and b together follows from theirs.

Each text has a 128-bit hash; the digest of texts t_1 .. t_n is the polynomial sum of hash(t_i) * BASE^(n-i) modulo a
prime. So it can be taken in pieces by any number of processes, stored and continued, and does not tell how the texts
were cut. It tells corpora apart; it is no defence against somebody who constructs two that agree.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

PRIME = (1 << 127) - 1
BASE = 0x5DEECE66D1234567F4A7C159E3779B97 % PRIME


@dataclass(frozen=True)
class TextDigest:
    """The digest of texts in order."""

    value: int = 0
    texts: int = 0

    def join(self, other: "TextDigest") -> "TextDigest":
        """The digest of these texts followed by the other's."""
        value = (self.value * pow(BASE, other.texts, PRIME) + other.value) % PRIME
        return TextDigest(value, self.texts + other.texts)

    @property
    def hex(self) -> str:
        return f"{self.value:032x}-{self.texts:x}"


def digest_of(contents: Iterable[bytes]) -> TextDigest:
    """The digest of texts given as UTF-8."""
    value = texts = 0
    for content in contents:
        text_hash = int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")
        value = (value * BASE + text_hash) % PRIME
        texts += 1
    return TextDigest(value, texts)


def parse_digest(text: str) -> TextDigest:
    """The digest that `hex` wrote."""
    value, _, texts = text.partition("-")
    return TextDigest(int(value, 16), int(texts, 16))
