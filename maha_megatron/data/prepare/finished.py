"""Whether a pair has to be made, or is there already, whole to the last byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from maha_megatron.data.manifest import Manifest, manifest_path, read_manifest
from maha_megatron.data.pair import check_pair
from maha_megatron.data.prepare.stage import finished_record
from maha_megatron.errors import DataError


def finished_pair(
    prefix: Path, arguments: dict[str, Any], *, advance: Callable[[int], object], say: Callable[[str], object]
) -> Manifest | None:
    """The manifest of a pair that was made with these arguments and is what was written; otherwise None.

    The .idx is held against its hash and the .bin against its checksums, which reads both.

    Args:
        prefix: Path of the pair without its ending.
        arguments: What the pair depends on.
        advance: Called with bytes of the .bin that were checked.
        say: Called with what is wrong with a pair that would be finished.
    """
    if not finished_record(manifest_path(prefix), [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")], arguments):
        return None
    try:
        check_pair(prefix, advance)
        return read_manifest(prefix)
    except DataError as error:
        say(f"warning: {error}; it is made again now")
        return None
