"""A pair that is being written: what is there survives a kill, and only the finished pair gets the final names.

The work folder holds the tokens, the lengths of the documents, the bad lines, and state.json, which says how much of
each is valid and where reading goes on. It is replaced whole, after what it speaks of is on the disk.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from maha_megatron.data import writing
from maha_megatron.data.checksums import TokenSums, entropy_nats, file_sha256
from maha_megatron.data.layout import ITEM_TYPES
from maha_megatron.data.manifest import Manifest, SourceRecord, bad_lines_path, manifest_path, write_manifest
from maha_megatron.data.prepare.blocks import Position
from maha_megatron.data.prepare.digest import TextDigest, parse_digest
from maha_megatron.data.prepare.encoding import EncodedBlock
from maha_megatron.data.prepare.index_file import CHUNK_ITEMS, token_code, write_index
from maha_megatron.data.prepare.work_folder import WorkFolder
from maha_megatron.data.tokenizer import Tokenizer
from maha_megatron.data.writing import cannot_write, join_files, settle, write_whole

COMMIT_INTERVAL_S = 2.0
TOKENS = "pair.bin"
FILES = (TOKENS, "lengths", "bad")
LENGTH = np.dtype("<i4")


class Spool:
    """Receives encoded blocks in order and becomes a pair.

    Args:
        prefix: Path of the pair without its ending.
        tokenizer: What encodes; its vocabulary decides the dtype.
        arguments: What the pair depends on. A folder left by a run with others is thrown away.

    Raises:
        DataError: Another process writes this pair, or the folder cannot be written.
    """

    def __init__(self, prefix: Path, tokenizer: Tokenizer, arguments: dict[str, Any]):
        self.prefix, self._tokenizer = prefix, tokenizer
        self._arguments = json.loads(json.dumps(arguments))
        self._work = WorkFolder(prefix)
        self._folder = self._work.path
        self._state_path = self._folder / "state.json"
        self.code = token_code(tokenizer.vocabulary)
        self._sums = TokenSums(tokenizer.vocabulary)
        self.position, self.read_bytes, self.bad_lines = Position(), 0, {}
        self.sources: list[SourceRecord] = []
        self._streams: dict[str, Any] = {}
        try:
            self._resume()
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    @property
    def documents(self) -> int:
        """Documents so far, empty ones included."""
        return sum(source.documents for source in self.sources)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents so far."""
        return sum(source.text_bytes for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return sum(source.tokens for source in self.sources)

    def add(self, block: EncodedBlock) -> None:
        """Take the next block.

        Raises:
            DataError: It cannot be written; what was committed stays for the next run.
        """
        try:
            writing.write(self._streams[TOKENS], memoryview(block.ids).cast("B"))
            writing.write(self._streams["lengths"], block.lengths.astype(LENGTH).tobytes())
            for bad in block.bad:
                writing.write(self._streams["bad"], (json.dumps(asdict(bad)) + "\n").encode())
                self.bad_lines[bad.kind] = self.bad_lines.get(bad.kind, 0) + 1
            self._sums.add(block.ids)
            self._count(block)
            self.position, self.read_bytes = block.end, block.read_bytes
            if time.monotonic() - self._committed_s > COMMIT_INTERVAL_S:
                self._commit()
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def finish(self, revisions: dict[str, tuple[str, str]]) -> Manifest:
        """Give the pair its final names; an old pair that has them goes.

        Args:
            revisions: Licence and revision of inputs, by their names, where given.

        Raises:
            DataError: A file cannot be written.
        """
        pair = self._work.pair
        try:
            self._commit()
            self._write_index(Path(f"{pair}.idx"))
            checksums = self._sums.save(pair)
            if self.bad_lines:
                join_files([self._folder / "bad"], bad_lines_path(pair))
            manifest = self._manifest(revisions, file_sha256(Path(f"{pair}.idx")), checksums)
            write_manifest(pair, manifest)
            self._close_streams()
            self._work.publish()
        except OSError as error:
            raise cannot_write(self.prefix, error) from error
        return manifest

    def _manifest(self, revisions: dict[str, tuple[str, str]], index_sha256: str, checksums_sha256: str) -> Manifest:
        digest = TextDigest()
        for source in self.sources:
            digest = digest.join(parse_digest(source.digest))
        return Manifest(
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocabulary=self._tokenizer.vocabulary,
            end_of_document=self._tokenizer.end_of_document,
            end_appended=self._arguments["append_eod"],
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            unigram_entropy_nats=entropy_nats(self._sums.counts),
            text_digest=digest.hex,
            sources=tuple(_described(source, revisions) for source in self.sources),
            bad_lines=self.bad_lines,
            index_sha256=index_sha256,
            checksums_sha256=checksums_sha256,
            arguments=self._arguments,
        )

    def discard(self) -> None:
        """Remove the folder."""
        self._close_streams()
        self._work.discard()

    def close(self) -> None:
        """Let go of the files; the folder stays."""
        self._close_streams()
        self._work.close()

    def _close_streams(self) -> None:
        for stream in self._streams.values():
            with suppress(OSError):  # what a full disk refused before
                stream.close()

    # ------------------------------------------------------------------------------------------------ continuing

    def _resume(self) -> None:
        """Cut the files to what state.json vouches for, or begin anew."""
        state = self._valid_state()
        if state is None:
            self._work.clear()
            state = {"sizes": dict.fromkeys(FILES, 0)}
        else:
            self.position, self.read_bytes = Position(*state["position"]), state["read_bytes"]
            self.bad_lines = state["bad_lines"]
            self.sources = [SourceRecord(**source) for source in state["sources"]]
        for name in FILES:
            stream = (self._folder / name).open("ab")
            stream.truncate(state["sizes"][name])
            self._streams[name] = stream
        self._add_sums_of_the_past()
        self._committed_s = time.monotonic()

    def _valid_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if state["arguments"] != self._arguments or set(state["sizes"]) != set(FILES):
            return None
        self._take_back_tokens()
        for name in FILES:
            path = self._folder / name
            if not path.exists() or path.stat().st_size < state["sizes"][name]:
                return None
        return state

    def _take_back_tokens(self) -> None:
        """Where the last run was killed while the pair got its names, the manifest last: go on with its tokens."""
        tokens, bin_path = self._folder / TOKENS, Path(f"{self.prefix}.bin")
        if not tokens.exists() and bin_path.exists() and not manifest_path(self.prefix).exists():
            os.replace(bin_path, tokens)

    def _add_sums_of_the_past(self) -> None:
        item_type = np.dtype(ITEM_TYPES[self.code])
        with (self._folder / TOKENS).open("rb") as stream:
            while content := stream.read(CHUNK_ITEMS * item_type.itemsize):
                self._sums.add(np.frombuffer(content, dtype=item_type))

    def _commit(self) -> None:
        """Make everything so far survive."""
        for stream in self._streams.values():
            settle(stream)
        state = {
            "arguments": self._arguments,
            "position": [self.position.file, self.position.offset, self.position.number],
            "read_bytes": self.read_bytes,
            "bad_lines": self.bad_lines,
            "sources": [asdict(source) for source in self.sources],
            "sizes": {name: stream.tell() for name, stream in self._streams.items()},
        }
        write_whole(self._state_path, json.dumps(state).encode())
        self._committed_s = time.monotonic()

    def _count(self, block: EncodedBlock) -> None:
        if not self.sources or self.sources[-1].name != block.argument:
            self.sources.append(
                SourceRecord(name=block.argument, documents=0, tokens=0, text_bytes=0, digest=TextDigest().hex)
            )
        last = self.sources[-1]
        self.sources[-1] = replace(
            last,
            documents=last.documents + len(block.lengths),
            tokens=last.tokens + block.ids.size,
            text_bytes=last.text_bytes + block.text_bytes,
            digest=parse_digest(last.digest).join(block.digest).hex,
        )

    # ------------------------------------------------------------------------------------------------- finishing

    def _write_index(self, path: Path) -> None:
        sequences = sum(int(np.count_nonzero(chunk)) for chunk in self._lengths())

        def bounds() -> Iterator[np.ndarray]:
            end = np.zeros(1, dtype=np.int64)
            yield end
            for chunk in self._lengths():
                ends = end[-1] + np.cumsum(chunk > 0, dtype=np.int64)
                yield ends
                end = ends[-1:] if ends.size else end

        write_index(
            path,
            code=self.code,
            sequences=sequences,
            bounds=self.documents + 1,
            lengths=lambda: (chunk[chunk > 0] for chunk in self._lengths()),
            documents=bounds,
        )

    def _lengths(self) -> Iterator[np.ndarray]:
        with (self._folder / "lengths").open("rb") as stream:
            while content := stream.read(CHUNK_ITEMS * LENGTH.itemsize):
                yield np.frombuffer(content, dtype=LENGTH)


def _described(source: SourceRecord, revisions: dict[str, tuple[str, str]]) -> SourceRecord:
    licence, revision = revisions.get(source.name, ("", ""))
    return replace(source, licence=licence, revision=revision)
