"""Where attention mass lies: the effective receptive field of one MAHA layer, read off its probabilities.

For row t and head n, block b of scale l carries the mass w_l P_lb: the scale's weight times the probability of the
block within its scale, so that the masses of a row sum to 1. A block's mass is spread evenly over its R_l rows:

    mass of row j for row t = sum_l w_l P_l,b(j) / R_l        b(j): the block of scale l that holds row j

Left out: the 4 rows that the convolution adds, and how unevenly a learned downsampling reads the rows of a block. No
gradient is taken. It costs t^2 n and holds one block of rows at a time: made to look at texts, not to train with.
"""

import dataclasses
from collections.abc import Iterator

import torch

from maha_megatron.attention.aggregation.solvers import SolveReport
from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.dispatch import Backend
from maha_megatron.attention.dispatch import backend as backend_named
from maha_megatron.attention.normalise_rotate import normalise, rotate, rotation
from maha_megatron.attention.pyramid.queries import pool_queries
from maha_megatron.attention.scale_attention.opened import best_blocks
from maha_megatron.attention.slots import first_slot_of, openable_slots, slots_of, visible_slots
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import stride

SHARES = (0.5, 0.9)
_ELEMENTS_AT_ONCE = 2**23


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReach:
    """One layer on one packed sequence of t rows.

    scale_weights_tnl: [t, n, L]. within_tnf: int64 [t, n, 2], how many rows back from a row, itself included, hold 50 %
    and 90 % of its mass (SHARES). mass_by_distance_nk: [n, K], mean over the rows of their mass at distances 0, 1, 2-3,
    4-7, ... solves: what the solver left, None where the weights have a closed form. names_l: what has each weight.
    """

    scale_weights_tnl: torch.Tensor
    within_tnf: torch.Tensor
    mass_by_distance_nk: torch.Tensor
    solves: SolveReport | None
    names_l: tuple[str, ...]


@torch.no_grad()
def layer_reach(
    q_tnd: torch.Tensor,
    k_tgd: torch.Tensor,
    v_tgd: torch.Tensor,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    *,
    backend: str = "eager",
) -> LayerReach:
    """Scale weights, receptive field and solver report of one layer; arguments as for `maha_attention`.

    Probabilities are formed in at least fp32 from what the backend's convolution and pyramid give.

    Raises:
        MahaError: what `maha_attention` raises.
    """
    tensors = (q_tnd, k_tgd, v_tgd, document_start_t)
    output = maha_attention(*tensors, parameters, spec, backend=backend, with_weights=True)
    probabilities = Probabilities(backend_named(backend), *tensors, parameters, spec)
    rows, heads, _ = q_tnd.shape
    within = torch.empty(rows, heads, len(SHARES), dtype=torch.long, device=q_tnd.device)
    by_distance = 0
    for block in _row_blocks(rows, heads):
        mass = row_mass(probabilities, output.scale_weights_tnl, block)
        within[block.start : block.stop] = _within(mass, block)
        by_distance += _by_distance(mass, block)
    return LayerReach(
        scale_weights_tnl=output.scale_weights_tnl,
        within_tnf=within,
        mass_by_distance_nk=by_distance / rows,
        solves=output.solves,
        names_l=(*(f"scale {scale}" for scale in range(spec.scales)), "opened")[: spec.branches],
    )


def distance_edges(rows: int) -> list[int]:
    """First distance of every bin of `mass_by_distance_nk`: 0, 1, 2, 4, ... below `rows`."""
    return [0, *(2**power for power in range((rows - 1).bit_length()))]


class Probabilities:
    """Softmax of every scale over its visible blocks, for any rows: the definition on whole tensors."""

    def __init__(
        self, operators: Backend, q_tnd, k_tgd, v_tgd, document_start_t, parameters: AttentionParameters, spec: MahaSpec
    ):
        self.document, self.parameters, self.spec = document_start_t.long(), parameters, spec
        if spec.convolution:
            weight = parameters.convolution
            q_tnd, k_tgd, v_tgd = operators.convolve(q_tnd, k_tgd, v_tgd, document_start_t, weight)
        self.levels = operators.build_pyramid((k_tgd, v_tgd), document_start_t, parameters, spec)
        self.queries = [q_tnd] * spec.scales
        if spec.queries == "pooled":
            self.queries = pool_queries(operators.build_pyramid, q_tnd, document_start_t, spec)
        self.dtype = torch.promote_types(q_tnd.dtype, torch.float32)
        self.slots = [slots_of(self.document, stride(spec.ratio, scale)) for scale in range(spec.scales)]

    def scale_of(self, branch: int) -> int:
        """The scale whose keys a branch reads: its own; that of the opened blocks for the last of a refined layer."""
        return branch if branch < self.spec.scales else self.spec.refine.to_scale

    def of(self, branch: int, block: range) -> torch.Tensor:
        """[rows of the block, n, slots of the branch's scale]; all 0 for a row that sees none of them."""
        scale = self.scale_of(branch)
        step, slots = stride(self.spec.ratio, scale), self.slots[scale]
        row = torch.arange(block.start, block.stop, device=self.document.device)
        document = self.document[block.start : block.stop]
        first, end = visible_slots(row, document, step, self.spec.windows[scale])
        turn = self.spec.rotary_stride(scale)
        slot_positions = (slots.last_row - slots.document).double() / turn
        if self.spec.queries == "pooled":  # a row reads what the last complete query block of its document found
            read = (end - 1).clamp(min=0)
            query, position = self.queries[scale][read], slot_positions[read]
        else:
            query, position = self.queries[scale][row], (row - document).double() / turn
        query = self._turned(query, self.parameters.query_gain, position)
        key = self._turned(self.levels[scale][0], self.parameters.key_gain, slot_positions)
        groups = key.shape[1]
        logits = torch.einsum("rgmd,sgd->rgms", query.unflatten(1, (groups, -1)), key).flatten(1, 2)
        slot = torch.arange(len(key), device=row.device)
        hidden = ((slot < first[:, None]) | (slot >= end[:, None]))[:, None]
        if branch == self.spec.scales:
            hidden = ~self._opened(block, row, document)
        logits = (logits * query.shape[-1] ** -0.5).masked_fill_(hidden, -torch.inf)
        return logits.softmax(-1).nan_to_num_(0.0)

    def _opened(self, block: range, row: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
        """Whether a row and head reads a slot of refine.to_scale in a block that its group opened: [rows, n, slots]."""
        spec, refine = self.spec, self.spec.refine
        groups, slots = self.levels[0][0].shape[1], self.slots[refine.to_scale]
        score = self.of(refine.from_scale, block).unflatten(1, (groups, -1)).sum(2)
        edges = openable_slots(row, document, spec.ratio, spec.windows, refine.from_scale, refine.to_scale)
        first, end = (edge[:, None, None] for edge in edges)
        slot = torch.arange(score.shape[-1], device=row.device)
        place, found = best_blocks(score, (first <= slot) & (slot < end), refine.blocks)
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(2, place, found)
        coarse, fine = (
            first_slot_of(slots.document, stride(spec.ratio, scale)) for scale in (refine.from_scale, refine.to_scale)
        )
        children = stride(spec.ratio, refine.from_scale - refine.to_scale)
        parent = coarse + (torch.arange(len(fine), device=row.device) - fine) // children
        opened = chosen.index_select(2, parent.clamp(max=score.shape[-1] - 1))
        # the slot of an incomplete block may hold the first block of the next document
        opened &= (document[:, None] == slots.document)[:, None]
        return opened.repeat_interleave(self.queries[0].shape[1] // groups, dim=1)

    def _turned(self, x: torch.Tensor, gain: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        x = normalise(x.to(self.dtype), gain.to(self.dtype), self.spec.norm_epsilon)
        return rotate(x, *rotation(position[:, None], x.shape[-1], self.spec.rope_base, self.dtype))


def row_mass(probabilities: Probabilities, scale_weights_tnl: torch.Tensor, block: range) -> torch.Tensor:
    """Mass [rows of the block, n, t] that every row of the sequence carries for the rows of the block."""
    document, spec = probabilities.document, probabilities.spec
    row, mass = torch.arange(len(document), device=document.device), 0
    for branch in range(spec.branches):
        scale = probabilities.scale_of(branch)
        step, slots = stride(spec.ratio, scale), probabilities.slots[scale]
        holder = (first_slot_of(document, step) + (row - document) // step).clamp(max=len(slots.document) - 1)
        # the slot of an incomplete block may hold the first block of the next document
        held = slots.complete[holder] & (slots.document[holder] == document)
        weight = scale_weights_tnl[block.start : block.stop, :, branch, None] / step
        mass = mass + (probabilities.of(branch, block) * weight).index_select(2, holder) * held
    return mass


def _within(mass: torch.Tensor, block: range) -> torch.Tensor:
    """For every share: how many rows back from its own, itself included, first hold it: [rows of the block, n, 2]."""
    gathered = mass.flip(-1).cumsum(-1)  # of the last row of the sequence, the last two, ...
    later = mass.shape[-1] - 1 - torch.arange(block.start, block.stop, device=mass.device)[:, None]
    return torch.stack([(gathered < share).sum(-1) - later + 1 for share in SHARES], dim=-1)


def _by_distance(mass: torch.Tensor, block: range) -> torch.Tensor:
    """Sum over the block's rows of the mass in each bin of distances: [n, bins]."""
    rows = mass.shape[-1]
    edges = torch.tensor(distance_edges(rows), device=mass.device)
    row = torch.arange(block.start, block.stop, device=mass.device)[:, None]
    distance = (row - torch.arange(rows, device=mass.device)).clamp(min=0)  # a row after this one has no mass
    bins = torch.bucketize(distance, edges, right=True) - 1
    total = mass.new_zeros(*mass.shape[:2], len(edges))
    return total.scatter_add_(2, bins[:, None].expand_as(mass), mass).sum(0)


def _row_blocks(rows: int, heads: int) -> Iterator[range]:
    step = max(_ELEMENTS_AT_ONCE // (rows * heads), 1)
    return (range(start, min(start + step, rows)) for start in range(0, rows, step))
