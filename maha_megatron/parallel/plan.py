"""The rank grid as pure arithmetic: which rank does what, known before any process group exists."""

from dataclasses import dataclass

from maha_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Ranks laid out with the tensor axis innermost, so that the ranks that talk most sit on one host.

    Four ranks, tensor 2:    rank            0  1  2  3
                             tensor rank     0  1  0  1
                             data rank       0  0  1  1
    """

    world_size: int
    tensor: int

    def __post_init__(self) -> None:
        if self.world_size % self.tensor:
            raise ConfigError(
                f"parallel.tensor = {self.tensor} does not divide the {self.world_size} processes of this run; "
                f"start a multiple of {self.tensor}, or lower parallel.tensor"
            )

    @property
    def data(self) -> int:
        """Data-parallel size: model copies that see different samples."""
        return self.world_size // self.tensor

    def tensor_rank(self, rank: int) -> int:
        """Which shard of the layers `rank` holds."""
        return rank % self.tensor

    def data_rank(self, rank: int) -> int:
        """Which samples `rank` reads."""
        return rank // self.tensor

    def tensor_ranks(self, rank: int) -> list[int]:
        """Ranks that share a model copy with `rank`."""
        first = rank - self.tensor_rank(rank)
        return list(range(first, first + self.tensor))

    def data_ranks(self, rank: int) -> list[int]:
        """Ranks that hold the same shard as `rank`."""
        return list(range(self.tensor_rank(rank), self.world_size, self.tensor))
