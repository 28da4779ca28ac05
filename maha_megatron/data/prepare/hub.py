"""Data sets of the `datasets` package, local or of the Hugging Face hub, streamed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from maha_megatron.data.prepare.blocks import BEGINNING, BLOCK_BYTES, BLOCK_ROWS, Block, Position
from maha_megatron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """Which rows to stream."""

    name: str
    """Of a hub repository, or the path of a local folder that `datasets` understands."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    def rows(self, skip: int = 0) -> Iterator[dict[str, Any]]:
        """Rows in order, the first `skip` left out.

        Raises:
            DataError: The data set is missing, unreachable or damaged.
        """
        import datasets

        try:
            rows = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
            yield from rows.skip(skip) if skip else rows
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"data set {self.name} cannot be streamed ({error})") from error

    def licence(self) -> str:
        """What the data set says of its licence; often nothing."""
        import datasets

        try:
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"data set {self.name} cannot be read ({error})") from error
        return builder.info.license or ""


def hub_blocks(source: HubSet, keys: Sequence[str], start: Position = BEGINNING) -> Iterator[Block]:
    """The rows' texts in blocks, from a position on.

    Raises:
        DataError: As HubSet.rows, or a row lacks a key.
    """
    rows: list[tuple[Any, ...]] = []
    characters, first = 0, start.number
    for number, row in enumerate(source.rows(start.number), start=start.number + 1):
        rows.append(tuple(text_of_row(source, row, key) for key in keys))
        characters += sum(len(value) for value in rows[-1] if isinstance(value, str))
        if characters >= BLOCK_BYTES or len(rows) >= BLOCK_ROWS:
            yield _row_block(source, first, keys, rows)
            rows, characters, first = [], 0, number
    if rows:
        yield _row_block(source, first, keys, rows)


def _row_block(source: HubSet, first: int, keys: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Block:
    columns = dict(zip(keys, zip(*rows, strict=True), strict=True))
    return Block(source.name, source.name, first, Position(0, 0, first + len(rows)), columns=columns)


def text_of_row(source: HubSet, row: dict[str, Any], key: str) -> Any:
    """The value of a row's field.

    Raises:
        DataError: There is no such field.
    """
    if key not in row:
        raise DataError(f"{source.name} has the fields {', '.join(row)}: name one by --json-keys")
    return row[key]
