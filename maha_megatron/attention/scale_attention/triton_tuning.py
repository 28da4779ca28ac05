"""How large the tiles of each kernel are: one table, looked up by card and dtype, never searched at run time.

Its times are in tools/results/attention_kernels_log_2026-11-27.md, those of warp groups in the README of attention. To
tune a card: `attend(..., tuning=Tuning(...))` of triton.py takes other tiles.
"""

from collections.abc import Sequence
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
    """

    rows: int = 64
    keys: int = 64
    heads: int = 1
    warps: int = 4
    stages: int = 2
    registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class GroupTiles:
    """Tiles of the forward by warp groups (gluon_forward.py), which has two of 64 rows in a program.

    Args:
        heads: 2, then a program has 64 rows of two heads, where 2 divides n/g; otherwise 128 rows of one.
        stages: tiles of 64 keys and values in shared memory.
    """

    heads: int = 2
    stages: int = 4

    def __post_init__(self) -> None:
        assert self.heads in (1, 2), self.heads


@dataclass(frozen=True, kw_only=True)
class KeyGroupTiles:
    """Tiles of the keys' gradients by warp groups (gluon_key_gradient.py): two of 64 keys share tiles of 64 rows.

    Args:
        stages: tiles of turned queries and dO in shared memory.
    """

    stages: int = 4


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The tiles of all kernels of one call; `keys.keys` is the tile of key preparation, which has no rows.

    Args:
        choice: of what a refined layer opens; `rows` are lines of one head each, of all heads of a KV group together.
        opened, opened_gradient: of opened keys; `rows` that opened one block.
        run: choices of a KV group, of which a row makes as many as it opens blocks, that one program of those takes.
        groups: of the forward by warp groups, on Hopper cards; None: the portable kernels, with `forward`.
        key_groups: of the keys' gradients by warp groups, there, where `key_gradient.keys` is 64; None: the portable
            kernel, with `key_gradient`.
        span: the most rows that one program of the keys' gradients, of either kernel, goes over, about; more programs
            share a tile of keys beyond.
        programs: backward takes KV groups in portions, of which each has at least so many programs, or takes all.
    """

    keys: Tiles = Tiles()
    forward: Tiles = Tiles()
    query_gradient: Tiles = Tiles()
    key_gradient: Tiles = Tiles()
    choice: Tiles = Tiles()
    opened: Tiles = Tiles(rows=32, warps=2)
    opened_gradient: Tiles = Tiles(rows=32, warps=4)
    run: int = 256
    span: int = 4096
    programs: int = 2048
    groups: GroupTiles | None = None
    key_groups: KeyGroupTiles | None = None


_KERNELS = ("keys", "forward", "query_gradient", "key_gradient", "choice", "opened", "opened_gradient")


def numbers_of(tuning: Tuning) -> list[int]:
    """The tuning as one list of whole numbers; `tuning_of` is the inverse."""
    numbers = []
    for name in _KERNELS:
        tiles = getattr(tuning, name)
        numbers += [tiles.rows, tiles.keys, tiles.heads, tiles.warps, tiles.stages, tiles.registers or 0]
    of_groups = [0, 0] if tuning.groups is None else [tuning.groups.heads, tuning.groups.stages]
    of_keys = 0 if tuning.key_groups is None else tuning.key_groups.stages
    return [*numbers, tuning.run, tuning.span, tuning.programs, *of_groups, of_keys]


def tuning_of(numbers: Sequence[int]) -> Tuning:
    *of_tiles, run, span, programs, heads_of_groups, stages_of_groups, stages_of_keys = numbers
    kernels = []
    for at in range(0, len(of_tiles), 6):
        rows, keys, heads, warps, stages, registers = of_tiles[at : at + 6]
        kernels.append(
            Tiles(
                rows=rows,
                keys=keys,
                heads=heads,
                warps=warps,
                stages=stages,
                registers=registers or None,
            )
        )
    return Tuning(
        **dict(zip(_KERNELS, kernels, strict=True)),
        run=run,
        span=span,
        programs=programs,
        groups=GroupTiles(heads=heads_of_groups, stages=stages_of_groups) if heads_of_groups else None,
        key_groups=KeyGroupTiles(stages=stages_of_keys) if stages_of_keys else None,
    )


_SMALL = Tiles(rows=32, keys=32, stages=1)
_HOPPER = Tuning(
    forward=Tiles(stages=3),
    query_gradient=Tiles(keys=32, stages=3),
    key_gradient=Tiles(rows=32, stages=3),
    span=2048,
    groups=GroupTiles(),
    key_groups=KeyGroupTiles(),
)
# within the 99 KB of shared memory that a program has on the smallest cards of that age
_ANY = Tuning(
    forward=Tiles(keys=32),
    query_gradient=Tiles(keys=32),
    key_gradient=Tiles(rows=32),
)


def tuning_for(itemsize_bytes: int, capability: tuple[int, int]) -> Tuning:
    """The tuning of a dtype of that size on a card of that compute capability; right on every card from Ampere on."""
    if itemsize_bytes == 4:
        smallest = Tiles(rows=16, keys=32, stages=1)
        return Tuning(
            keys=Tiles(keys=32),
            forward=_SMALL,
            query_gradient=_SMALL,
            key_gradient=smallest,
            choice=_SMALL,
            opened=Tiles(rows=16, warps=2, stages=1),
            opened_gradient=Tiles(rows=16, stages=1),
        )
    return _HOPPER if capability == (9, 0) else _ANY
