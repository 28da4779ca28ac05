"""Documents for small Megatron pairs."""

import numpy as np

END = 2
VOCABULARY = 1000


def random_documents(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Documents of random length and tokens, each ended."""
    generator = np.random.default_rng(seed)
    return [[*generator.integers(3, VOCABULARY, generator.integers(1, longest)).tolist(), END] for _ in range(count)]
