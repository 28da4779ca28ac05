"""Data sets of the `datasets` package, local or of the Hugging Face hub, streamed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maha_megatron.data.prepare.blocks import BEGINNING, BLOCK_BYTES, Block, Position
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


def hub_blocks(source: HubSet, key: str, start: Position = BEGINNING) -> Iterator[Block]:
    """The rows' texts in blocks, from a position on.

    Raises:
        DataError: As HubSet.rows, or a row lacks the key.
    """
    texts: list[Any] = []
    characters, first = 0, start.number
    for number, row in enumerate(source.rows(start.number), start=start.number + 1):
        texts.append(text_of_row(source, row, key))
        characters += len(texts[-1]) if isinstance(texts[-1], str) else 0
        if characters >= BLOCK_BYTES or len(texts) >= 1000:
            yield Block(source.name, source.name, first, Position(0, 0, number), texts=tuple(texts))
            texts, characters, first = [], 0, number
    if texts:
        yield Block(source.name, source.name, first, Position(0, 0, first + len(texts)), texts=tuple(texts))


def text_of_row(source: HubSet, row: dict[str, Any], key: str) -> Any:
    """The value of a row's field.

    Raises:
        DataError: There is no such field.
    """
    if key not in row:
        raise DataError(f"{source.name} has the fields {', '.join(row)}: name one by --json-keys")
    return row[key]
