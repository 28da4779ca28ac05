"""How large the tiles of each kernel are: one table, looked up by head width and dtype, never searched at run time."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One kernel's tiles.

    Args:
        rows: rows of a tile of one query head.
        keys: keys of a tile.
        heads: query heads of one KV group that share a tile of rows; a power of 2 that divides n/g.
        warps, stages: as Triton's num_warps and num_stages.
        registers: the most that a thread may have; the compiler's own limit where None.
        flatten: make one loop of the loop over scales and the one over their tiles.
    """

    rows: int = 64
    keys: int = 64
    heads: int = 1
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    flatten: bool = False


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The tiles of all kernels of one call; `keys.keys` is the tile of key preparation, which has no rows."""

    keys: Tiles = Tiles()
    forward: Tiles = Tiles()
    query_gradient: Tiles = Tiles()
    key_gradient: Tiles = Tiles()


def tuning_for(width: int, itemsize_bytes: int) -> Tuning:
    """The tuning of heads of `width` channels in a dtype of that size; correct on every card from Ampere on."""
    if itemsize_bytes == 4:
        small = Tiles(rows=32, keys=32, stages=1)
        return Tuning(keys=Tiles(keys=32), forward=small, query_gradient=small, key_gradient=small)
    wide = Tiles(rows=128, warps=8)
    return Tuning(forward=wide, query_gradient=wide, key_gradient=Tiles(rows=32, keys=128, warps=8))
