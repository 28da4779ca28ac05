"""The second kernel of backward, of every scale on its own: keys and values of every scale, and the keys' gain.

The programs and their rows are those of triton_key_gradient.py, whose third kernel adds up what programs shared. A tile
of keys lies in one scale, and reads that scale's dO_l, delta_l and LSE_l.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import LOG2_E
from maha_megatron.attention.scale_attention.triton_key_gradient import (
    at_sums,
    load_key_tile,
    load_rows,
    locate_part,
    rows_at,
    seeing_rows,
    store_key_gradients,
)
from maha_megatron.attention.triton_slots import past_of, pick, slot_count, within


@triton.jit
def scales_key_gradient_kernel(
    queries,
    keys,
    raw_keys,
    key_gain,
    places,
    grad_outs,  # Rows: a head and scale is a head of its own
    found,  # by scales_query_gradient_kernel
    made,
    parts,  # of every scale, how many programs share a tile
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    HALF: tl.constexpr = SHAPE.half
    SCALES: tl.constexpr = len(SHAPE.windows)
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    unit: tl.constexpr = LOG2_E / (2 * HALF) ** 0.5
    scale, tile, part, line = locate_part(tl.program_id(0), places.rows, parts, KEYS, SHAPE)
    group, past = tl.program_id(1), past_of(scale, SHAPE)
    entries = past + slot_count(places.rows, SHAPE.ratio, scale)
    entry = tile * KEYS + tl.arange(0, KEYS)
    inside, slot = (entry < entries)[:, None], entry - past
    begin, stop = seeing_rows(tile * KEYS - past, tl.minimum(tile * KEYS + KEYS, entries) - past, places, scale, SHAPE)
    shared_by = pick(parts, scale)
    span = tl.cdiv(tl.cdiv(stop - begin, shared_by), ROWS) * ROWS
    begin = begin + part * span
    stop = tl.minimum(begin + span, stop)
    key_tile, value_tile = load_key_tile(keys, entry, group, places, scale, inside, SHAPE)
    channels = tl.arange(0, 2 * HALF)
    grad_value = tl.zeros([KEYS, 2 * HALF], tl.float32)
    grad_key = tl.zeros([KEYS, 2 * HALF], tl.float32)
    for head in tl.range(group * queries.n_per_group, (group + 1) * queries.n_per_group):
        of_scale = (head * SCALES + scale).to(tl.int64) * places.rows
        turned = found.turned + of_scale * (2 * HALF)
        for at in tl.range(begin, stop, ROWS):
            row, real, see_from, see_to = rows_at(at, places, scale, SHAPE, ROWS)
            query_at = turned + row[:, None] * (2 * HALF) + channels[None, :]
            query = tl.load(query_at, mask=real[:, None], other=0.0)
            logits = tl.dot(key_tile, query.T, input_precision=SHAPE.precision)
            norm = tl.load(found.norms + head * places.rows + row, mask=real, other=0.0)
            offset = tl.load(found.offsets + of_scale + row, mask=real, other=0.0)
            seen = within(slot[:, None], see_from[None, :], (see_to - see_from)[None, :])
            weight = tl.exp2(tl.where(seen, logits * (norm * unit)[None, :] + offset[None, :], float("-inf")))
            grad = load_rows(grad_outs, row, head * SCALES + scale, real, channels)
            grad_value = tl.dot(weight.to(operand), grad, grad_value, input_precision=SHAPE.precision)
            grad_weight = tl.dot(value_tile, grad.T, input_precision=SHAPE.precision)
            delta = tl.load(found.delta + of_scale + row, mask=real, other=0.0)
            grad_logits = weight * (grad_weight - delta[None, :]) * norm[None, :]
            grad_key = tl.dot(grad_logits.to(operand), query, grad_key, input_precision=SHAPE.precision)
    if shared_by > 1:
        sums_at = at_sums(made.sums, tl.program_id(0), group, KEYS, 2 * HALF)
        tl.store(sums_at, grad_key)
        tl.store(sums_at + KEYS * 2 * HALF, grad_value)
    else:
        where = (places, entry, group, scale, inside)
        store_key_gradients(grad_key, grad_value, line, raw_keys, key_gain, made, *where, SHAPE)
