"""Incremental state: a sequence read in pieces, cut anywhere, equals one pass, gradients included.

A row reads the last w_l complete blocks of each scale and, through the convolution, 4 rows back. So all that the past
hands to the future is, per scale, the newest w_l keys and values, the last 4 raw rows, and how many rows of the running
document have been read. The pending children of a block that straddles the border are the newest entries of the finer
scale: nothing else is kept for them.

A refined layer must keep more: of refine.to_scale every key and value that a row to come may open, the children of all
blocks that the window of refine.from_scale spans, r^(from - to) (w_from + 1) - 1 entries in place of w_to. Where that
window spans the whole sequence, as the coarsest does, this is O(s): with refine.to_scale 0 as much as a dense layer's
cache. Only the reading stays O(log s) there.

    rows of a piece count from 0; its running document, of which o rows were read before, starts at row -o

    scale 2, R = 4, o = 7        past                  | piece
    rows                   -7 -6 -5 -4 -3 -2 -1        | 0  1  2  3  4  5
    slots                  [    -1    ][       0           ][       1 ..
    entries of the state    in scale 2   children in scale 1 and in the piece

Slot arithmetic with a negative document start is that of slots.py unchanged; entries lie in front of slot 0. Decoding a
token is a piece of one row. B streams advance in lockstep by pieces of equal length, each with its own documents.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maha_megatron.attention.convolution.naive import CONVOLUTION_REACH
from maha_megatron.attention.slots import first_slot_of, visible_slots
from maha_megatron.attention.spec import MahaSpec
from maha_megatron.attention.state_identity import differences, identity
from maha_megatron.errors import ConfigError, StateError
from maha_megatron.scales import stride


@dataclass(frozen=True, kw_only=True)
class MahaState:
    """What B streams hand from one piece to the next, for one attention layer.

    Differentiable: gradients of later pieces reach earlier ones through `entries` and `rows`. Nothing in it grows while
    a sequence is read. Make one with `initial`; `maha_attention` returns the next.

    Args:
        entries: for each scale [B, h_l + ceil(k / R_l), 2, g, d] keys (0) and values (1) of the newest complete blocks
            of the running document, newest last, after convolution and key map, neither normalised nor rotated; zero
            where there is no block. h_l is w_l, but for the scale whose keys a refined layer opens. k rows can be taken
            back (`rewind_rows`).
        rows: [B, 4 + k, n + 2g, d] raw queries, keys, values of the last rows of the running document, newest last,
            zero where there is none; None without convolution.
        offset: int64 [B], rows of the running document so far; 0 before the first row of a document.
        rewindable: int64 [B], how many rows `cut_back` can take back now.
        ratio, held: r and the h_l, as in the spec (`held_entries`).
        operator: numbers that tell the operator from another one (state_identity.py).

    Sharding: n and g are those of this rank; every tensor but the counts is sharded along its heads.
    """

    entries: tuple[torch.Tensor, ...]
    rows: torch.Tensor | None
    offset: torch.Tensor
    rewindable: torch.Tensor
    ratio: int
    held: tuple[int, ...]
    operator: tuple[int, ...]

    @classmethod
    def initial(
        cls,
        spec: MahaSpec,
        *,
        streams: int,
        n: int,
        g: int,
        d: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rewind_rows: int = 0,
    ) -> "MahaState":
        """The state before the first row.

        Args:
            streams: B.
            n, g, d: query heads, KV groups and head width of this rank.
            dtype, device: those of the queries, keys and values to come.
            rewind_rows: k, the most rows that `cut_back` will be asked for; holding them costs k raw rows and
                ceil(k / R_l) entries a scale.

        Raises:
            ConfigError: pooled queries, which have no state.
        """
        refuse_pooled_queries(spec)
        assert streams > 0, streams
        assert rewind_rows >= 0, rewind_rows
        for scale, window in enumerate(spec.windows[:-1]):
            assert window >= spec.ratio - 1, (
                f"the window of scale {scale} is {window}: at least ratio - 1 = {spec.ratio - 1} entries must be held "
                f"below the last scale, for they are the children of the next scale's unfinished block"
            )
        shapes = _shapes(spec, streams=streams, n=n, g=g, d=d, rewind_rows=rewind_rows)
        tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        counts = torch.zeros(2, streams, dtype=torch.int64, device=device)
        return cls._of(tensors | {"offset": counts[0].clone(), "rewindable": counts[1].clone()}, spec)

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], spec: MahaSpec) -> "MahaState":
        """The state that `tensors()` took apart.

        Raises:
            StateError: it was saved under another operator, or names or shapes are not those of a state of `spec`.
        """
        if "operator" in tensors:
            different = differences(tensors["operator"].flatten().tolist(), spec)
            if different:
                raise StateError(
                    f"this state is not of this layer: {different}; restore it with the spec that it was saved under"
                )
        expected = {f"entries.{scale}" for scale in range(spec.scales)} | {"operator", "offset", "rewindable"}
        expected |= {"rows"} if spec.convolution else set()
        if tensors.keys() != expected or tensors["entries.0"].ndim != 5:
            raise StateError(
                f"a state of this attention has the tensors {sorted(expected)}, entries with 5 dimensions; these are "
                f"{ {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())} }: "
                "restore it with the spec that it was saved under"
            )
        streams, held, _, g, d = tensors["entries.0"].shape
        n = tensors["rows"].shape[2] - 2 * g if spec.convolution else 0
        sizes = {"streams": streams, "n": n, "g": g, "d": d, "rewind_rows": held - spec.held_entries[0]}
        shapes = _shapes(spec, **sizes) | {"offset": (streams,), "rewindable": (streams,)}
        wrong = {name: tuple(tensors[name].shape) for name in shapes if tuple(tensors[name].shape) != shapes[name]}
        if sizes["rewind_rows"] < 0 or wrong:
            raise StateError(
                f"these tensors are no state of windows {spec.windows} and ratio {spec.ratio}, which "
                f"{ {name: shapes[name] for name in wrong} } would fit but not {wrong}: "
                "restore it with the spec that it was saved under"
            )
        return cls._of(tensors, spec)

    @classmethod
    def _of(cls, tensors: dict[str, torch.Tensor], numbers: "MahaSpec | MahaState") -> "MahaState":
        """From tensors by name, with what a spec or another state says of the operator."""
        held = numbers.held_entries if isinstance(numbers, MahaSpec) else numbers.held
        return cls(
            entries=tuple(tensors[f"entries.{scale}"] for scale in range(len(held))),
            rows=tensors.get("rows"),
            offset=tensors["offset"],
            rewindable=tensors["rewindable"],
            ratio=numbers.ratio,
            held=held,
            operator=numbers.operator if isinstance(numbers, MahaState) else identity(numbers),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, detached and contiguous, none sharing memory: what safetensors saves.

        One of them, `operator`, int64 on the CPU, is no part of any stream: it says under which spec this was saved.
        """
        named = self._named() | {"operator": torch.tensor(self.operator, dtype=torch.int64)}
        return {name: tensor.detach().contiguous() for name, tensor in named.items()}

    def _named(self) -> dict[str, torch.Tensor]:
        named = {f"entries.{scale}": entry for scale, entry in enumerate(self.entries)}
        named |= {"offset": self.offset, "rewindable": self.rewindable}
        return named if self.rows is None else named | {"rows": self.rows}

    @property
    def streams(self) -> int:
        return len(self.offset)

    @property
    def rewind_rows(self) -> int:
        """k: the most rows that can ever be taken back at once, but for going back to the document's start."""
        return self.entries[0].shape[1] - self.held[0]

    def document_start(self, rows: int, new_documents: Sequence[Sequence[int]] = ()) -> torch.Tensor:
        """document_start_t of the next piece.

        Args:
            rows: rows of the piece, in every stream.
            new_documents: for each stream the rows of the piece, counted from 0, at which a new document starts; left
                out where there is none in any stream.

        Returns:
            [B * rows] int64, stream after stream, on the state's device; the host does not wait for it. Rows of the
            running document hold -offset. With another value there, positions would be wrong and blocks would pool the
            wrong rows, and but on a CPU no error would say so.
        """
        new_documents = new_documents or [()] * self.streams
        assert len(new_documents) == self.streams, (len(new_documents), self.streams)
        starts = (-self.offset)[:, None].repeat(1, rows)
        for stream, new in enumerate(new_documents):
            for row in sorted(new):
                assert 0 <= row < rows, f"a new document of stream {stream} at row {row} of a piece of {rows}"
                starts[stream, row:] = row
        return starts.flatten()

    def reorder(self, index: torch.Tensor) -> "MahaState":
        """The streams `index` (int64 [B'], repetition welcome), as beam search picks them."""
        return self._each(lambda tensor: tensor.index_select(0, index))

    def detach(self) -> "MahaState":
        """Without the history of its gradients: training in pieces, truncated here."""
        return self._each(torch.Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "MahaState":
        """On another device, or entries and raw rows in another dtype."""
        return self._each(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def cut_back(self, rows: int | torch.Tensor) -> "MahaState":
        """The state as if the last `rows` rows (an int, or int64 [B] for each stream) had never been read.

        Exact or refused: within `rewindable` rows, or all the way to the start of the running document, where only a
        new document can go on. Reads `rewindable` and `offset` back to the host.

        Raises:
            StateError: what these rows pushed out of the state is not held.
        """
        back = torch.as_tensor(rows, dtype=torch.int64, device=self.offset.device).expand(self.streams)
        possible = (back >= 0) & ((back <= self.rewindable) | (back == self.offset))
        if not possible.all():
            stream = possible.int().argmin().item()
            read, most = self.offset[stream].item(), self.rewindable[stream].item()
            raise StateError(
                f"stream {stream} cannot go back {back[stream].item()} rows: of its running document it has read "
                f"{read}, and can go back 0 to {most} rows, or {read} to the document's start; create the state with "
                f"rewind_rows (now {self.rewind_rows}) as large as the longest cut, or restore a saved state"
            )
        offset = self.offset - back
        entries = []
        for scale, entry in enumerate(self.entries):
            step = stride(self.ratio, scale)
            entries.append(_drop_newest(entry, self.offset // step - offset // step))
        return dataclasses.replace(
            self,
            entries=tuple(entries),
            rows=None if self.rows is None else _drop_newest(self.rows, back),
            offset=offset,
            rewindable=torch.where(offset == 0, 0, self.rewindable - back),
        )

    def past(self, stream: int) -> "Past":
        """What one stream's piece reads."""
        entries = [entry[stream, -count:].unbind(1) for entry, count in zip(self.entries, self.held, strict=True)]
        return Past(entries, None if self.rows is None else self.rows[stream, -CONVOLUTION_REACH:])

    def after(
        self,
        stream: int,
        levels: Sequence[tuple[torch.Tensor, torch.Tensor]],
        raw_qkv: Sequence[torch.Tensor],
        document_start_t: torch.Tensor,
    ) -> "MahaState":
        """The state of one stream (B = 1) after a piece; it belongs to the document of the piece's last row.

        Args:
            levels: packed keys and values of every scale with the h_l entries of `past` in front of slot 0.
            raw_qkv: the piece's raw q [t, n, d], k and v [t, g, d].
            document_start_t: [t] int64.
        """
        length, document = document_start_t.numel(), document_start_t[-1]
        entries = []
        for scale, level in enumerate(levels):
            held, step = self.entries[scale][stream], stride(self.ratio, scale)
            older, keep = len(held) - self.held[scale], len(held)
            _, end = visible_slots(length - 1, document, step, keep)
            slot = end + torch.arange(-keep, 0, device=document.device)
            missing = slot < first_slot_of(document, step)
            kept = []
            for kind, slots in enumerate(level):
                slots = torch.cat((held[:older, kind], slots)) if older else slots
                kept.append(slots.index_select(0, slot + keep))
            entries.append(torch.stack(kept, dim=1).masked_fill(missing[:, None, None, None], 0))
        rows = None
        if self.rows is not None:
            keep = self.rows.shape[1]
            rows = torch.cat((self.rows[stream], torch.cat([x[-keep:] for x in raw_qkv], dim=1)))[-keep:]
            missing = torch.arange(length - keep, length, device=document.device) < document
            rows = rows.masked_fill(missing[:, None, None], 0)
        offset = length - document
        kept_back = torch.where(document < 0, self.rewindable[stream] + length, offset).clamp(max=self.rewind_rows)
        one = dataclasses.replace(self, entries=tuple(entries), rows=rows, offset=offset, rewindable=kept_back)
        return one._each(lambda tensor: tensor[None])

    @staticmethod
    def stack(states: Sequence["MahaState"]) -> "MahaState":
        """The streams of several states, in order."""
        named = [state._named() for state in states]
        return MahaState._of({name: torch.cat([tensors[name] for tensors in named]) for name in named[0]}, states[0])

    def _each(self, change) -> "MahaState":
        return MahaState._of({name: change(tensor) for name, tensor in self._named().items()}, self)


@dataclass(frozen=True)
class Past:
    """One stream's past: `entries` L times keys and values, each [h_l, g, d]; `rows` [4, n + 2g, d] raw (None without
    convolution).
    """

    entries: list[tuple[torch.Tensor, torch.Tensor]]
    rows: torch.Tensor | None


def piece_document_start(document_start_t: torch.Tensor, first_row: int, stop_row: int) -> torch.Tensor:
    """document_start_t of the piece [first_row, stop_row) of a sequence, from that of the whole sequence.

    Rows of the piece count from 0, so a document that began before it has a negative start.
    """
    return document_start_t[first_row:stop_row] - first_row


def refuse_pooled_queries(spec: MahaSpec) -> None:
    """Raises ConfigError: a pooled query is the mean of a block that pieces may cut, and no state holds its rows."""
    if spec.queries == "pooled":
        raise ConfigError('pooled queries cannot run in pieces: use `queries: "full"`, or run the sequence in one pass')


def check_state(state: MahaState, spec: MahaSpec, q: torch.Tensor, k: torch.Tensor) -> None:
    """Asserts that the state is one of this layer and these inputs [B * t, ...]."""
    refuse_pooled_queries(spec)
    (rows, n, d), g = q.shape, k.shape[1]
    assert state.operator == identity(spec), f"the state is of another layer: {differences(state.operator, spec)}"
    assert rows % state.streams == 0, f"{rows} rows are not pieces of equal length of {state.streams} streams"
    shapes = _shapes(spec, streams=state.streams, n=n, g=g, d=d, rewind_rows=state.rewind_rows)
    named = state._named()
    for name, shape in shapes.items():
        assert named[name].shape == shape, f"{name} of the state is {tuple(named[name].shape)}, not {shape}"
        found, wanted = (named[name].dtype, named[name].device), (k.dtype, k.device)
        assert found == wanted, f"{name} of the state is {found}, the keys are {wanted}: move it with state.to(...)"


def check_document_start(document_start_t: torch.Tensor, state: MahaState | None = None) -> None:
    """Each row goes on with its document or starts one; looked at on a CPU only, where that costs next to nothing.

    Without a state the first row starts one; else each stream's piece may go on with the document of its state.

    Raises:
        StateError: some row does neither. Such a start would give wrong positions, and blocks of the wrong rows.
    """
    if document_start_t.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if state is None:
        start, before = document_start_t[None], document_start_t.new_zeros(1, 1)
    elif state.offset.device.type == "cpu":
        start, before = document_start_t.view(state.streams, -1), -state.offset[:, None]
    else:
        return
    goes_on = torch.cat((before, start[:, :-1]), dim=1)
    wrong = ((start != goes_on) & (start != torch.arange(start.shape[1]))).nonzero()
    if not len(wrong):
        return
    stream, row = wrong[0].tolist()
    found, kept = start[stream, row].item(), goes_on[stream, row].item()
    where = f"document_start of row {row}" + ("" if state is None else f" of stream {stream}")
    if state is None:
        allowed = f"{kept} where the document goes on, or {row} where a new one starts" if row else "0"
        raise StateError(
            f"{where} is {found}: it must be {allowed}. Rows count from the first of the packed sequence, where a "
            "document starts; a piece of a longer one needs its state"
        )
    raise StateError(
        f"{where} is {found}: it must be {kept} where the document goes on, or {row} where a new one starts. Rows "
        f"count from the piece's first, and the state has read {state.offset[stream].item()} rows of the running "
        "document: make the piece's starts with state.document_start or piece_document_start"
    )


def _shapes(spec: MahaSpec, *, streams: int, n: int, g: int, d: int, rewind_rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the floating-point tensors of a state, by the names of `MahaState.tensors`."""
    shapes = {}
    for scale, held in enumerate(spec.held_entries):
        extra = -(-rewind_rows // stride(spec.ratio, scale))
        shapes[f"entries.{scale}"] = (streams, held + extra, 2, g, d)
    if spec.convolution:
        shapes["rows"] = (streams, CONVOLUTION_REACH + rewind_rows, n + 2 * g, d)
    return shapes


def _drop_newest(held: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[B, m, ...] without the newest count[b], the older ones moved up, zeros in front."""
    index = torch.arange(held.shape[1], device=held.device) - count[:, None]
    shape = (*index.shape, *[1] * (held.ndim - 2))
    older = held.gather(1, index.clamp(min=0).view(shape).expand_as(held))
    return older.masked_fill((index < 0).view(shape), 0)
