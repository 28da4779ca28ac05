"""Decoding by kernels: the next few rows of all streams of a state, whatever their offsets, in three launches.

    advance_rows_kernel      convolves, pools the blocks that the rows complete, keeps raw rows and counts
    attend_entries_kernel    attends, split over the entries, and writes the entries of the next state
    join_kernel              joins the parts

Nothing is read back to the host and shapes depend on numbers alone, so that a CUDA graph may hold a step. Floor: the
state is read and written once, 4 sum_l w_l g d numbers a stream, whatever the context's length. For inference: where
gradients are asked for, and for longer pieces, api.py goes stream by stream.
"""

import dataclasses
import itertools

import torch
import triton

from maha_megatron.attention.convolution.triton import lines_of
from maha_megatron.attention.convolution.triton_walk import Packed
from maha_megatron.attention.decode.triton_entries import attend_entries_kernel, join_kernel
from maha_megatron.attention.decode.triton_rows import advance_rows_kernel
from maha_megatron.attention.decode.triton_step import Learned, Parts, Step, Streams
from maha_megatron.attention.pyramid.triton import learned_of
from maha_megatron.attention.scale_attention.attended import Attended
from maha_megatron.attention.scale_attention.triton_geometry import frequency_table
from maha_megatron.attention.scale_attention.triton_ops import Numbers, Tensor, Tensors, is_one_softmax
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.state import MahaState
from maha_megatron.attention.triton_launch import Launch, compiled, lined_up, unserved_heads
from maha_megatron.scales import slot_count, stride

MOST_ROWS, MOST_LINES = 16, 64  # of a stream's piece; rows times query heads of a group, the lines of one product
_FEWEST_LINES = 16  # that a matrix product takes


def advance(
    q_tnd: torch.Tensor,
    k_tgd: torch.Tensor,
    v_tgd: torch.Tensor,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    state: MahaState,
    with_weights: bool,
) -> tuple[Attended, MahaState] | None:
    """What `maha_attention` makes of the next rows of all streams, and the state after them; None where it does not
    serve them. Arguments as there.
    """
    learned = learned_of(parameters, spec)
    of_state = [*state.entries, *([] if state.rows is None else [state.rows])]
    tensors = [q_tnd, k_tgd, v_tgd, *of_state, *(x for x in vars(parameters).values() if x is not None)]
    if not serves(q_tnd, k_tgd.shape[1], spec, state.streams) or needs_gradients(tensors):
        return None
    out, weights, offset, rewindable, *tensors = advance_streams(
        [q_tnd, k_tgd, v_tgd],
        document_start_t,
        list(state.entries),
        state.rows,
        state.offset,
        state.rewindable,
        parameters.convolution,
        learned,
        parameters.query_gain,
        parameters.key_gain,
        parameters.utility_query,
        parameters.utility_bias,
        spec.downsampling,
        spec.ratio,
        list(spec.windows),
        spec.rope_base,
        spec.rope_unit,
        spec.norm_epsilon,
        with_weights,
    )
    entries, rows = tensors[: spec.scales], tensors[spec.scales :]
    after = dataclasses.replace(
        state, entries=tuple(entries), rows=rows[0] if rows else None, offset=offset, rewindable=rewindable
    )
    return Attended(out_tnd=out, weights_tnl=weights if with_weights else None, report=None), after


def serves(q_tnd: torch.Tensor, g: int, spec: MahaSpec, streams: int) -> bool:
    """Whether the kernels do: few rows a stream, and one softmax over all scales."""
    _, n, d, rows = *q_tnd.shape, len(q_tnd) // streams
    few = rows <= MOST_ROWS and rows * (n // g) <= MOST_LINES
    return few and is_one_softmax(spec) and not spec.key_map and unserved_heads(d, q_tnd.dtype) is None


def needs_gradients(tensors) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class Call:
    """One call's tensors and numbers, as the kernels take them."""

    def __init__(self, x, document_start, old: Streams, taps, pyramid, learned: Learned, spec: MahaSpec):
        self.x, self.document_start = [lined_up(rows) for rows in x], document_start.contiguous()
        self.old = Streams(
            tuple(entry.contiguous() for entry in old.entries),
            None if old.rows is None else old.rows.contiguous(),
            old.offset.contiguous(),
            old.rewindable.contiguous(),
        )
        self.taps, self.pyramid = None if taps is None else taps.contiguous(), tuple(t.contiguous() for t in pyramid)
        self.learned, self.spec = learned, spec
        self.streams, self.device = len(old.offset), x[0].device
        (self.lines, self.n, self.d), self.g, self.dtype = x[0].shape, x[1].shape[1], x[0].dtype
        self.step = self._step()
        self.keys = 64 if self.dtype.itemsize == 2 else 32
        self.tiles = sum(
            triton.cdiv(held + slots, self.keys) for held, slots in zip(self.step.held, self.step.slots, strict=True)
        )

    def _step(self) -> Step:
        spec, rows = self.spec, self.lines // self.streams
        held = tuple(entry.shape[1] for entry in self.old.entries)
        slots = tuple(slot_count(rows, stride(spec.ratio, scale)) for scale in range(spec.scales))
        return Step(
            rows=rows,
            kept_rows=0 if self.old.rows is None else self.old.rows.shape[1],
            rewind_rows=held[0] - spec.windows[0],
            method=spec.downsampling,
            ratio=spec.ratio,
            windows=spec.windows,
            held=held,
            slots=slots,
            slots_before=(0, *itertools.accumulate(slots)),
            half=self.d // 2,
            epsilon=spec.norm_epsilon,
            fast=self.dtype.itemsize == 2 and compiled(),
            precision="tf32x3" if self.dtype.itemsize == 4 else "tf32",
        )

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def empty_state(self) -> Streams:
        old = self.old
        entries = tuple(self.empty(*entry.shape) for entry in old.entries)
        rows = None if old.rows is None else self.empty(*old.rows.shape)
        return Streams(entries, rows, *(self.empty(self.streams, dtype=torch.int64) for _ in range(2)))

    def empty_parts(self) -> Parts:
        numbers = [self.empty(self.lines, self.n, self.tiles, dtype=torch.float32) for _ in range(2)]
        return Parts(*numbers, self.empty(self.lines, self.n, self.tiles, self.d, dtype=torch.float32))

    def _launch(self, kernel: triton.JITFunction, grid: tuple[int, ...], warps: int = 4, **arguments) -> Launch:
        arguments["STEP"] = self.step
        return Launch(kernel=kernel, grid=grid, arguments=arguments, options={"num_warps": warps}, device=self.device)

    def rows(self, new: Streams, fresh: torch.Tensor, queries: torch.Tensor) -> Launch:
        return self._launch(
            advance_rows_kernel,
            (self.n + 2 * self.g, self.streams),
            warps=1 if self.step.rows <= 4 else 4,  # one needs no barriers, and few rows are no work for more
            x=lines_of(self.x),
            old=self.old,
            new=new,
            taps=self.taps,
            learned=self.pyramid,
            fresh=fresh,
            queries=queries,
            packed=Packed(self.document_start, self.lines, self.n, self.g),
            ROWS=triton.next_power_of_2(self.step.rows),
            SLOTS=tuple(triton.next_power_of_2(slots) for slots in self.step.slots),
            COARSE=triton.next_power_of_2(sum(self.step.slots[1:])),
            CHILDREN=triton.next_power_of_2(self.step.ratio),
        )

    def attention(self, new: Streams, fresh: torch.Tensor, queries: torch.Tensor, parts: Parts) -> Launch:
        lines = triton.next_power_of_2(self.step.rows * (self.n // self.g))
        return self._launch(
            attend_entries_kernel,
            (self.tiles, self.g, self.streams),
            queries=queries,
            old=self.old,
            fresh=fresh,
            new=new,
            learned=self.learned,
            document_start=self.document_start,
            parts=parts,
            n=self.n,
            g=self.g,
            LINES=max(lines, _FEWEST_LINES),
            KEYS=self.keys,
        )

    def joining(self, parts: Parts, out: torch.Tensor, weights: torch.Tensor | None) -> Launch:
        tiles = {"tiles": self.tiles, "KEYS": self.keys, "TILES": triton.next_power_of_2(self.tiles)}
        return self._launch(join_kernel, (self.lines * self.n,), parts=parts, out=out, weights=weights, **tiles)

    def run(self, with_weights: bool) -> tuple[torch.Tensor, torch.Tensor | None, Streams]:
        """Output [B T, n, d], weights [B T, n, L] where asked for, and the streams after it."""
        new, parts = self.empty_state(), self.empty_parts()
        fresh = self.empty(self.streams, self.step.slots_before[-1], 2, self.g, self.d)
        queries, out = (self.empty(self.lines, self.n, self.d) for _ in range(2))
        weights = self.empty(self.lines, self.n, self.spec.scales, dtype=torch.float32) if with_weights else None
        self.rows(new, fresh, queries).run()
        self.attention(new, fresh, queries, parts).run()
        self.joining(parts, out, weights).run()
        return out, weights, new


@torch.library.custom_op("maha_megatron::advance_streams", mutates_args=())
def advance_streams(
    x: Tensors,
    document_start: Tensor,
    entries: Tensors,
    rows: Tensor | None,
    offset: Tensor,
    rewindable: Tensor,
    taps: Tensor | None,
    pyramid: Tensors,
    query_gain: Tensor,
    key_gain: Tensor,
    rho: Tensor | None,
    beta: Tensor | None,
    downsampling: str,
    ratio: int,
    windows: Numbers,
    rope_base: float,
    rope_unit: str,
    norm_epsilon: float,
    with_weights: bool,
) -> Tensors:
    """Output, weights (empty if not asked for), and the state after it: offset, rewindable, entries, raw rows."""
    rope = {"rope_base": rope_base, "rope_unit": rope_unit}
    spec = MahaSpec(ratio=ratio, windows=tuple(windows), downsampling=downsampling, **rope, norm_epsilon=norm_epsilon)
    frequency = frequency_table(x[0].shape[-1], rope_base, spec.rotary_ratio, len(windows), x[0].device)
    gains = (query_gain.contiguous(), key_gain.contiguous())
    utilities = (None, None) if rho is None else (rho.contiguous(), beta.contiguous())
    old, learned = Streams(tuple(entries), rows, offset, rewindable), Learned(*gains, *utilities, frequency)
    out, weights, new = Call(x, document_start, old, taps, pyramid, learned, spec).run(with_weights)
    kept = [] if new.rows is None else [new.rows]
    return [out, out.new_empty(0) if weights is None else weights, new.offset, new.rewindable, *new.entries, *kept]


@advance_streams.register_fake
def _(x, document_start, entries, rows, offset, rewindable, taps, pyramid, query_gain, key_gain, rho, beta, *numbers):
    q, windows, with_weights = x[0], numbers[2], numbers[-1]
    weights = q.new_empty((*q.shape[:2], len(windows)), dtype=torch.float32) if with_weights else q.new_empty(0)
    kept = [] if rows is None else [rows]
    return [q.new_empty(q.shape), weights, *(y.new_empty(y.shape) for y in (offset, rewindable, *entries, *kept))]
