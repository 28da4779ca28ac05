"""What banded scale attention holds while it runs: one chunk's queries, and the keys and values that they read.

Shapes: queries and logits of a chunk are [g, rows, n/g, z]; as operands of a matrix product they are cut into tiles,
[g * tiles, tile rows * n/g, z], against the tiles' bands of keys or values, [g * tiles, width, d]. So the query heads
of a KV group share one product, and keys are never repeated.
"""

import math

import torch
import torch.nn.functional as F

from maha_megatron.attention.normalise_rotate import normalise, normalise_rotate, quarter_turn, rotation
from maha_megatron.attention.scale_attention.bands import gather_tiles, plan_bands, visibility_bias
from maha_megatron.attention.scale_attention.opened import Opened, chunk_rows
from maha_megatron.attention.slots import slots_of
from maha_megatron.attention.spec import MahaSpec

# logits of one scale that exist at once: they stay in the cache of a CPU, and fill a GPU
_LOGITS_PER_CHUNK = {"cpu": 3 * 2**19, "cuda": 2**26}


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched matrix product, summed in fp32; of 16-bit operands the result is fp32 on CUDA and 16-bit on a CPU."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype.itemsize < 4 else torch.bmm(a, b)


def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16; without them they are slower than in fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def exp_(x: torch.Tensor) -> torch.Tensor:
    """e^x in place for x <= 0, as a power of two: torch's exp is 20 times slower on a CPU where x has -inf in it.

    Rounding x / ln 2 costs |x| e^x half units of the last place of 1, less than half of one.
    """
    return x.mul_(1 / math.log(2)).exp2_()


class Call:
    """What one call holds for all its chunks: parameters and where slots stand. Keys are made chunk by chunk.

    `tensors` are the keys and values of every scale: keys of scale 0, values of scale 0, keys of scale 1, ...; under
    refinement also those that may be opened, whose attention is that of one more scale, the last. `opened`: what a
    forward opened (`Opened.first_child`), for its backward.

    Logits, softmax and accumulation are in at least fp32. Matrix products read operands in the inputs' dtype on CUDA,
    where tensor cores want them. On a CPU that multiplies bf16 (4 times as fast as fp32) only those do that come after
    the softmax: their results are rounded to bf16 before they are summed over scales and tiles in fp32.
    """

    def __init__(self, q, query_gain, key_gain, rho, beta, start_t, spec: MahaSpec, past_slots, tensors, opened=None):
        rows, heads, _ = q.shape
        self.q, self.spec, self.past_slots = q, spec, past_slots
        self.keys, self.values = tensors[: 2 * spec.scales : 2], tensors[1 : 2 * spec.scales : 2]
        self.query_gain, self.key_gain, self.rho, self.beta = query_gain, key_gain, rho, beta
        self.groups, self.dtype = self.keys[0].shape[1], torch.promote_types(q.dtype, torch.float32)
        self.operand = q.dtype if q.is_cuda else self.dtype
        self.fast = q.dtype if q.is_cuda or (q.dtype == torch.bfloat16 and _multiplies_bf16()) else self.dtype
        limit = _LOGITS_PER_CHUNK["cuda" if q.is_cuda else "cpu"] // (heads * 2 * max(spec.windows))
        if spec.refine is not None:
            limit = min(limit, chunk_rows(self.groups, q, spec))
        self.plan = plan_bands(rows, spec.ratio, spec.windows, limit, past_slots)
        self.bands = self.plan.bands
        # a padding row is a document of its own: it sees nothing of the sequence, and nothing sees it
        self.document = F.pad(start_t, (0, self.plan.padded_rows - rows), value=rows)
        self._position = [self._positions(scale) for scale in range(spec.scales)]
        self._spans, self._operands = [range(0)] * spec.scales, [(None, None)] * spec.scales
        self.opened = None if spec.refine is None else Opened(self, *tensors[2 * spec.scales :], opened)

    def _positions(self, scale: int) -> torch.Tensor:
        """fp64 [entries]: the position of a block is that of its last row, over R where positions count blocks."""
        band = self.bands[scale]
        slots = slots_of(self.document[: len(self.q)], band.stride_rows, self.past_slots[scale])
        return (slots.last_row - slots.document).double() / self.spec.rotary_stride(scale)

    def real(self, scale: int, span: range) -> slice:
        """The entries of a level that lie in a span of slots; the rest of the span is padding."""
        past, entries = self.past_slots[scale], len(self.keys[scale])
        return slice(min(max(span.start + past, 0), entries), min(max(span.stop + past, 0), entries))

    def inside(self, scale: int, span: range, entries: slice) -> slice:
        """Where entries of a level lie in a span that holds them."""
        first = entries.start - self.past_slots[scale] - span.start
        return slice(first, first + entries.stop - entries.start)

    def rotation_of(self, entries: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [all entries, 1, d] of keys, those of every scale one after the other."""
        position = torch.cat([at[here] for at, here in zip(self._position, entries, strict=True)])
        return rotation(position[:, None], self.q.shape[-1], self.spec.rope_base, self.dtype)

    def advance(self, start: int, rows: int) -> None:
        """Make the operands of the spans of a chunk, all scales at once: they are small, and each step costs a call.

        Chunks come in order; what a span shares with the one before it is taken from there.
        """
        spans = [band.span(start, rows) for band in self.bands]
        begin = [held.stop if held else span.start for held, span in zip(self._spans, spans, strict=True)]
        fresh = [self.real(scale, range(begin[scale], span.stop)) for scale, span in enumerate(spans)]
        counts = [entries.stop - entries.start for entries in fresh]
        raw = torch.cat([keys[entries] for keys, entries in zip(self.keys, fresh, strict=True)])
        made = torch.empty(raw.shape, dtype=self.operand, device=raw.device)
        normalise_rotate(raw, self.key_gain, *self.rotation_of(fresh), self.spec.norm_epsilon, made)
        for scale, keys in enumerate(made.split(counts)):
            values, inside = self.values[scale][fresh[scale]], self.inside(scale, spans[scale], fresh[scale])
            moved = []
            for old, new, dtype in zip(self._operands[scale], (keys, values), (self.operand, self.fast), strict=True):
                moved.append(self.moved(old, self._spans[scale], spans[scale], dtype))
                moved[-1][:, inside] = new.transpose(0, 1)
            self._operands[scale] = tuple(moved)
        self._spans = spans

    def moved(self, old: torch.Tensor | None, held: range, span: range, dtype: torch.dtype) -> torch.Tensor:
        """[g, slots of the span, d] with what `old` holds of it, 0 elsewhere."""
        new = torch.zeros(self.groups, len(span), self.q.shape[-1], dtype=dtype, device=self.q.device)
        shared = held.stop - max(held.start, span.start)
        if old is not None and shared:
            new[:, :shared] = old[:, len(held) - shared :]
        return new

    def operands(self, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (normalised, rotated; for logits) and values (`fast`) of the span: [g, slots, d], padding is 0."""
        return self._operands[scale]


class Chunk:
    """Queries of `rows` consecutive rows: raw and normalised [g, rows, n/g, d], utilities [g, rows, n/g, L]."""

    def __init__(self, call: Call, start: int, rows: int):
        self.call, self.start, self.rows = call, start, rows
        self.row = torch.arange(start, start + rows, device=call.q.device)
        self.document = call.document[start : start + rows]
        self.raw = self.read(call.q)
        self.gain = call.query_gain.to(call.dtype).unflatten(0, (call.groups, 1, -1))
        self.normal = normalise(self.raw, self.gain, call.spec.norm_epsilon)
        self.turned = quarter_turn(self.normal)
        self.turns = self._turns()
        call.advance(start, rows)
        self._held, self._tiles = None, None
        self.utility = self.normal.new_zeros(*self.normal.shape[:-1], 1)
        if call.rho is not None:
            self.rho = call.rho.to(call.dtype).unflatten(1, (call.groups, -1))
            self.utility = torch.einsum("grmd,lgmd->grml", self.normal, self.rho)
            self.utility += call.beta.to(call.dtype).unflatten(1, (call.groups, 1, -1)).movedim(0, -1)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """This chunk of x by KV group: [t, n, z] -> [g, rows, n/g, z], zero beyond the sequence."""
        rows = x[self.start : self.start + self.rows].unflatten(1, (self.call.groups, -1)).transpose(0, 1)
        missing = self.rows - rows.shape[1]
        rows = F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows
        return rows.to(self.call.dtype).contiguous()

    def write(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """The inverse of `read`: into [t, n, z], leaving out what lies beyond the sequence."""
        target = x[self.start : self.start + self.rows].unflatten(1, (self.call.groups, -1)).transpose(0, 1)
        target.copy_(rows[:, : target.shape[1]])

    def _turns(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """By scale: cos and sin [rows, 1, d] of the queries' positions, times the 1 / sqrt(d) of the logits."""
        spec, position = self.call.spec, (self.row - self.document).double()
        positions = torch.stack([position / spec.rotary_stride(scale) for scale in range(spec.scales)])
        width = self.raw.shape[-1]
        cos, sin = rotation(positions[..., None], width, spec.rope_base, self.call.dtype)
        turns = list(zip(cos.mul_(width**-0.5), sin.mul_(width**-0.5), strict=True))
        return turns if spec.refine is None else [*turns, turns[spec.refine.to_scale]]

    def rotated(self, scale: int) -> torch.Tensor:
        """Queries as the logits of one scale read them."""
        cos, sin = self.turns[scale]
        return (self.normal * cos).addcmul_(self.turned, sin)

    def logits(self, rotated: torch.Tensor, scale: int) -> torch.Tensor:
        """[g, rows, n/g, width of the band], -inf where a slot is not visible."""
        rotated = self.to_tiles(rotated, scale, self.call.operand)
        logits = self.from_tiles(product(rotated, self.tiles(scale)[0].mT))
        if scale == self.call.spec.scales:
            return logits.add_(self.call.opened.bias(self))
        bias = visibility_bias(self.call.bands[scale], self.row, self.start, self.document, logits.dtype)
        return logits.add_(bias[:, None])

    def tiles(self, scale: int) -> list[torch.Tensor]:
        """Keys and values of the bands of this chunk: [g * tiles, width of the band, d]; kept until another scale."""
        if self._held != scale:
            self._tiles = None  # first, so that two scales' tiles never exist at once
            if scale == self.call.spec.scales:
                self._tiles = self.call.opened.gather(self)
            else:
                band = self.call.bands[scale]
                self._tiles = [gather_tiles(span, band, self.rows) for span in self.call.operands(scale)]
            self._held = scale
        return self._tiles

    def to_tiles(self, x: torch.Tensor, scale: int, dtype: torch.dtype) -> torch.Tensor:
        """[g, rows, n/g, z] -> [g * tiles, tile rows * n/g, z], an operand of a matrix product."""
        count = self.rows if scale == self.call.spec.scales else self.call.bands[scale].tiles(self.rows)
        return x.to(dtype).reshape(x.shape[0] * count, -1, x.shape[-1])

    def from_tiles(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse, in the dtype of the arithmetic."""
        return x.view(self.call.groups, self.rows, -1, x.shape[-1]).to(self.call.dtype)


def attend_scale(chunk: Chunk, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [g, rows, n/g, d] and log-sum-exp [g, rows, n/g] of one scale; 0 and -inf where nothing is visible.

    At refine.from_scale the chunk's rows then choose what they open.
    """
    logits = chunk.logits(chunk.rotated(scale), scale)
    # a row that sees nothing has maximum -inf: any finite shift then gives exp(-inf) = 0
    top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    p = exp_(logits.sub_(top))
    mass = p.sum(-1, keepdim=True)
    output = chunk.from_tiles(product(chunk.to_tiles(p, scale, chunk.call.fast), chunk.tiles(scale)[1]))
    least = mass.clamp(min=torch.finfo(mass.dtype).tiny)
    if chunk.call.opened is not None and scale == chunk.call.spec.refine.from_scale:
        chunk.call.opened.choose(chunk, p.div_(least))
    return output.div_(least), (top + mass.log()).squeeze(-1)
