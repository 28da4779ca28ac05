"""Merging and splitting pairs in constant memory, with 64-bit offsets; holes of sparse files stay holes.

What has a manifest is checked while it is copied, so that no damage gets checksums of its own.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from maha_megatron.data import writing
from maha_megatron.data.checksums import TokenSums, entropy_nats, file_sha256
from maha_megatron.data.layout import REBUILD, PairIndex
from maha_megatron.data.manifest import Manifest, bad_lines_path, write_manifest
from maha_megatron.data.pair import PairFiles, damaged, read_pair_files
from maha_megatron.data.prepare.digest import TextDigest, parse_digest
from maha_megatron.data.prepare.index_file import in_chunks, write_index
from maha_megatron.data.prepare.work_folder import new_pair
from maha_megatron.data.writing import COPIED_AT_ONCE, join_files, settle
from maha_megatron.errors import DataError


@dataclass(frozen=True)
class _Part:
    """Documents [first, last) of a pair."""

    prefix: Path
    files: PairFiles
    first: int
    last: int

    @property
    def index(self) -> PairIndex:
        return self.files.index

    @property
    def sequences(self) -> tuple[int, int]:
        return int(self.index.documents[self.first]), int(self.index.documents[self.last])

    @property
    def bytes(self) -> tuple[int, int]:
        first, last = self.sequences
        if first == last:
            return 0, 0
        end = int(self.index.pointers[last - 1]) + int(self.index.lengths[last - 1]) * self.index.item_type.itemsize
        return int(self.index.pointers[first]), end


def merge_pairs(
    prefixes: Sequence[Path], output: Path, *, arguments: dict[str, Any], advance: Callable[[int], object]
) -> Manifest | None:
    """Write one pair with the documents of several, in order.

    Args:
        prefixes: Paths of the pairs without their endings.
        output: Of the new pair; all or nothing.
        arguments: Kept in the manifest.
        advance: Called with bytes of the .bin that were done.

    Returns:
        The manifest; None where an input has none, since then nobody knows the tokenizer.

    Raises:
        DataError: A pair is damaged, or of another dtype or tokenizer or without ends where others have them, or the
            output is an input or cannot be written.
    """
    files = [read_pair_files(prefix) for prefix in prefixes]
    parts = [_Part(p, f, 0, len(f.index.documents) - 1) for p, f in zip(prefixes, files, strict=True)]
    _refuse_inputs(prefixes, [output])
    manifests = [part.files.manifest for part in parts]
    _check_of_one_kind(parts, manifests)
    known = all(manifests)
    counted = all(part.files.counts is not None for part in parts)
    sums = TokenSums(manifests[0].vocabulary if known else 0)
    with new_pair(output) as pair:
        _write_documents(parts, pair, sums, advance, count=known and not counted)
        _join_bad_lines(prefixes, pair)
        if not known:
            return None
        if counted:
            sums.counts = sum(part.files.counts for part in parts)
        return _describe(pair, sums, merged_manifest(manifests, arguments))


def merged_manifest(manifests: Sequence[Manifest], arguments: dict[str, Any]) -> Manifest:
    """What is known of pairs together, before the files of the new one are."""
    text_bytes = [manifest.text_bytes for manifest in manifests]
    return replace(
        manifests[0],
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        text_bytes=None if None in text_bytes else sum(text_bytes),
        text_digest=_joined_digest(manifests),
        sources=_joined_sources(manifests),
        bad_lines=_added([manifest.bad_lines for manifest in manifests]),
        arguments=arguments,
    )


def split_pair(
    prefix: Path, outputs: Sequence[tuple[Path, int]], *, arguments: dict[str, Any], advance: Callable[[int], object]
) -> None:
    """Write consecutive documents of a pair as pairs of their own.

    Args:
        prefix: Path of the pair without its ending.
        outputs: Path of each new pair and how many documents it takes; together all of them. All or nothing.
        arguments: Kept in the manifests.
        advance: As in merge_pairs.

    Raises:
        DataError: The pair is damaged, or an output is the pair itself or cannot be written.
    """
    files, first = read_pair_files(prefix), 0
    manifest = files.manifest
    _refuse_inputs([prefix], [output for output, _ in outputs])
    with ExitStack() as made:  # they get their names together, when all are written
        for output, documents in outputs:
            part = _Part(prefix, files, first, first + documents)
            sums = TokenSums(manifest.vocabulary if manifest else 0)
            pair = made.enter_context(new_pair(output))
            _write_documents([part], pair, sums, advance, count=manifest is not None)
            if manifest:
                _describe(pair, sums, _part_of(manifest, part, arguments))
            first += documents
        assert first == len(files.index.documents) - 1


def _part_of(manifest: Manifest, part: _Part, arguments: dict[str, Any]) -> Manifest:
    """What is known of a part of a pair, before its files are."""
    begin, end = part.bytes
    share = {"documents": [part.first, part.last], "of": manifest.text_digest}
    return replace(
        manifest,
        documents=part.last - part.first,
        tokens=(end - begin) // part.index.item_type.itemsize,
        text_bytes=None,
        text_digest=_hashed(manifest.text_digest, part.first, part.last),
        sources=(),
        bad_lines={},
        arguments={**arguments, "part": share},
    )


def _describe(output: Path, sums: TokenSums, manifest: Manifest) -> Manifest:
    """Write checksums and manifest of a new pair."""
    manifest = replace(
        manifest,
        unigram_entropy_nats=entropy_nats(sums.counts),
        checksums_sha256=sums.save(output),
        index_sha256=file_sha256(Path(f"{output}.idx")),
        format=2,
    )
    write_manifest(output, manifest)
    return manifest


def _refuse_inputs(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Refuse outputs whose files are an input's, under whatever name: they would be overwritten while read."""
    read = {path for prefix in inputs for path in _files(prefix)}
    for output in outputs:
        if read & _files(output):
            raise DataError(f"{output} is an input too: write to another name")


def _files(prefix: Path) -> set[Path]:
    return {Path(f"{prefix}.{ending}").resolve() for ending in ("bin", "idx")}


def _check_of_one_kind(parts: Sequence[_Part], manifests: Sequence[Manifest | None]) -> None:
    first = parts[0]
    for part in parts:
        if part.index.code != first.index.code:
            raise DataError(
                f"{part.prefix} stores tokens as {part.index.item_type}, {first.prefix} as {first.index.item_type}:"
                " they were made with different tokenizers; preprocess one of them again"
            )
    known = [(part.prefix, manifest) for part, manifest in zip(parts, manifests, strict=True) if manifest]
    for prefix, manifest in known:
        other, first_manifest = known[0]
        if manifest.tokenizer_fingerprint != first_manifest.tokenizer_fingerprint:
            raise DataError(f"{prefix} was made with another tokenizer than {other}: preprocess one of them again")
        if manifest.end_appended != first_manifest.end_appended:
            without, ended = (prefix, other) if first_manifest.end_appended else (other, prefix)
            raise DataError(
                f"the documents of {without} have no ends and those of {ended} have: preprocess {without} again with"
                " --append-eod"
            )


def _joined_digest(manifests: Sequence[Manifest]) -> str:
    if any("-" not in manifest.text_digest for manifest in manifests):  # of format 1 or of a split: they do not join
        return _hashed(*(manifest.text_digest for manifest in manifests))
    joined = TextDigest()
    for manifest in manifests:
        joined = joined.join(parse_digest(manifest.text_digest))
    return joined.hex


def _hashed(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _joined_sources(manifests: Sequence[Manifest]) -> tuple:
    """All sources in order; one that goes on in the next pair, as an input cut into partitions does, stays one."""
    joined: list = []
    for source in (source for manifest in manifests for source in manifest.sources):
        last = joined[-1] if joined else None
        if last and (last.name, last.licence, last.revision) == (source.name, source.licence, source.revision):
            joined[-1] = replace(
                last,
                documents=last.documents + source.documents,
                tokens=last.tokens + source.tokens,
                text_bytes=last.text_bytes + source.text_bytes,
                digest=parse_digest(last.digest).join(parse_digest(source.digest)).hex,
            )
        else:
            joined.append(source)
    return tuple(joined)


def _added(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {
        kind: sum(part.get(kind, 0) for part in counts) for kind in sorted({kind for part in counts for kind in part})
    }


def _join_bad_lines(prefixes: Sequence[Path], output: Path) -> None:
    found = [path for path in map(bad_lines_path, prefixes) if path.is_file()]
    if found:
        join_files(found, bad_lines_path(output))


# ---------------------------------------------------------------------------------------------------------- writing


def _write_documents(
    parts: Sequence[_Part], output: Path, sums: TokenSums, advance: Callable[[int], object], *, count: bool
) -> None:
    with Path(f"{output}.bin").open("wb") as stream:
        for part in parts:
            _copy(part, stream, sums, advance, count=count)
        stream.truncate(stream.tell())  # a hole at the end is there only when the size says so
        settle(stream)

    def lengths() -> Iterator[np.ndarray]:
        for part in parts:
            first, last = part.sequences
            yield from in_chunks(part.index.lengths[first:last])

    def documents() -> Iterator[np.ndarray]:
        yield np.zeros(1, dtype=np.int64)
        before = 0
        for part in parts:
            first, last = part.sequences
            for chunk in in_chunks(part.index.documents[part.first + 1 : part.last + 1]):
                yield chunk - first + before
            before += last - first

    write_index(
        Path(f"{output}.idx"),
        code=parts[0].index.code,
        sequences=sum(part.sequences[1] - part.sequences[0] for part in parts),
        bounds=1 + sum(part.last - part.first for part in parts),
        lengths=lengths,
        documents=documents,
    )


def _copy(part: _Part, target: BinaryIO, sums: TokenSums, advance: Callable[[int], object], *, count: bool) -> None:
    """Append a part's tokens; holes are passed over. What was read is then held against the part's checksums."""
    begin, end = part.bytes
    size = part.files.chunk_bytes
    first_chunk, before = divmod(begin, size)
    read = TokenSums(0, size)
    with Path(f"{part.prefix}.bin").open("rb", buffering=0) as source:
        read.add_bytes(os.pread(source.fileno(), before, begin - before))
        while begin < end:
            data = _next(source, begin, os.SEEK_DATA, end)
            target.seek(data - begin, os.SEEK_CUR)
            for taken in (read, sums):
                taken.add_zeros(data - begin)
            if count:
                sums.counts[0] += (data - begin) // part.index.item_type.itemsize
            advance(data - begin)
            begin = _next(source, data, os.SEEK_HOLE, end)
            source.seek(data)
            while data < begin:
                content = source.read(min(COPIED_AT_ONCE, begin - data))
                if not content:
                    raise _became_shorter(source)
                read.add_bytes(content)
                if count:
                    _count(part, sums, content)
                sums.add_bytes(content)
                writing.write(target, content)
                advance(len(content))
                data += len(content)
        read.add_bytes(os.pread(source.fileno(), -end % size, end))
    if part.files.checksums is not None:
        written = part.files.checksums[first_chunk : first_chunk + len(read.crc32)]
        for chunk in np.flatnonzero(read.crc32 != written):
            raise damaged(part.prefix, (first_chunk + int(chunk)) * size, size)


def _count(part: _Part, sums: TokenSums, content: bytes) -> None:
    tokens = np.frombuffer(content, dtype=part.index.item_type)
    if tokens.min() < 0 or tokens.max() >= sums.counts.size:
        raise DataError(
            f"{part.prefix}.bin is damaged: it holds token ids that are none of the {sums.counts.size} of its manifest;"
            f" {REBUILD}"
        )
    sums.counts += np.bincount(tokens, minlength=sums.counts.size)


def _next(source: BinaryIO, position: int, what: int, end: int) -> int:
    """Where the next data or hole begins, at most `end`; a file system that knows no holes has data everywhere."""
    if position >= end:
        return end
    try:
        return min(os.lseek(source.fileno(), position, what), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            return position if what == os.SEEK_DATA else end
        if os.fstat(source.fileno()).st_size < end:  # what is missing is no hole
            raise _became_shorter(source) from error
        return end


def _became_shorter(source: BinaryIO) -> DataError:
    return DataError(f"{source.name} became shorter while it was read: let nothing else write to it, and run again")
