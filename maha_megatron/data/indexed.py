"""megatron-core's own reader and writer of .bin/.idx pairs, without its remarks on missing packages."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder"]
