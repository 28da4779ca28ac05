"""Small Megatron pairs and configurations over them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from maha_megatron.config.schema import Config, Data, Model, Run, Source, Train
from maha_megatron.data.indexed import IndexedDatasetBuilder
from maha_megatron.data.manifest import Manifest, write_manifest
from tests.support.pairs import END, VOCABULARY


@pytest.fixture
def write_pair(tmp_path: Path) -> Callable[..., str]:
    """Write documents as a pair, as Megatron's tools do; with a manifest unless told otherwise."""

    def write(name: str, documents: Sequence[Sequence[int]], *, manifest: bool = True, **overrides) -> str:
        prefix = tmp_path / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for document in documents:
            builder.add_document(np.array(document), [len(document)])
        builder.finalize(f"{prefix}.idx")
        if manifest:
            values = {
                "tokenizer_fingerprint": "test:1",
                "vocabulary": VOCABULARY,
                "end_of_document": END,
                "end_appended": True,
                "documents": len(documents),
                "tokens": sum(map(len, documents)),
                "text_bytes": 4 * sum(map(len, documents)),
                "unigram_entropy_nats": 1.0,
                "text_digest": "0-0",
                "arguments": {},
            }
            write_manifest(prefix, Manifest(**(values | overrides)))
        return str(prefix)

    return write


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """A configuration over prefixes; keywords of `data` and `train` may be given."""

    def make(*prefixes: str, weights: Sequence[float] = (), seed: int = 7, train: dict | None = None, **data) -> Config:
        sources = tuple(
            Source(prefix=prefix, weight=weight)
            for prefix, weight in zip(prefixes, weights or [1.0] * len(prefixes), strict=True)
        )
        return Config(
            run=Run(folder=str(tmp_path / "run"), seed=seed),
            model=Model(vocabulary=VOCABULARY),
            data=Data(**({"sequence_tokens": 16, "train": sources, "validation_frac": 0.2} | data)),
            train=Train(**({"global_batch_samples": 8, "micro_batch_samples": 1} | (train or {}))),
        )

    return make
