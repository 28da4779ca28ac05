"""Parameters, floating-point operations and memory from the configuration alone; torch-free, asserted by tests.

Counting rules of operations. A multiplication and an addition are one operation each; a product with a weight matrix is
2 per weight and token. The attention operator is counted all-in, on MAHA's and on dense's side alike:
    both        score and value products of the visible pairs, RoPE (3 per turned element; of queries at every scale, or
                once where all scales count tokens), convolution (6 for three taps, 1 for the product in silu, 1 for the
                sum, per channel)
    MAHA        pyramid (a child of K or V: 4d + 1 with a gate, 2d + 1 of it for its score; 2d with a kernel, 2 per
                weight; d for a mean or a maximum), key map (2d^2 per block), pooled queries (d per child),
                utilities (2d + 1, + 1 with LSE, per scale; none for equal weights), Gram matrix (2d per pair of scales
                i <= j) and solver (aggregation_cost.py), combination of the scales (2d per scale)
    refined     as MAHA with one more scale, the opened keys, in all that fuses scales, and their score and value
                products; their queries and keys are turned already. Selection, for each block that may be opened: 1 per
                query head for its probability, from the logit that attention has, the sum over a group's heads, and a
                comparison per group in each of the passes that find the best blocks one by one
    neither     exponentials, norms, projections
Under grouped queries, products, query RoPE, utilities, Gram, solver and combination are counted per query head; key
RoPE, pyramid and key map per KV group, for dense as for MAHA. Pooled queries attend once per block: visible pairs are
then pairs of blocks. A sequence is one document, the most expensive case. Not counted: the solver of a stated program.
"""

from collections.abc import Callable
from typing import Any

from maha_megatron import scales
from maha_megatron.config.aggregation_cost import gram_flops, solver_flops
from maha_megatron.config.derive import data_parallel_size, layer_attention, maha_windows, padded_vocabulary, uses_maha
from maha_megatron.config.schema import Config

ROPE_FLOPS_PER_ELEMENT = 3
CONVOLUTION_TAPS = 3
CONVOLUTION_FLOPS_PER_CHANNEL = 2 * CONVOLUTION_TAPS + 2
BACKWARD_PER_FORWARD = 2


# ------------------------------------------------------------------------------------------------------- parameters


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters by group, over all ranks and without copies; padding rows of the vocabulary included.

    Returns:
        embedding, attention_projections, attention_operator (everything that attention/spec.py names), mlp, norms,
        output (0 when tied).
    """
    model = config.model
    table = padded_vocabulary(config) * model.hidden
    heads_width, groups_width = model.heads * model.head_width, model.kv_groups * model.head_width
    operator = {kind: _operator_parameters(config, kind) for kind in ("maha", "refined", "dense")}
    return {
        "embedding": table,
        "attention_projections": model.layers * model.hidden * (2 * heads_width + 2 * groups_width),
        "attention_operator": sum(operator[kind] for kind in layer_attention(config)),
        "mlp": model.layers * 3 * model.hidden * model.ffn_hidden,
        "norms": (2 * model.layers + 1) * model.hidden,
        "output": 0 if model.tied_embeddings else table,
    }


def total_parameters(config: Config) -> int:
    """All parameters of the model."""
    return sum(parameter_counts(config).values())


def _operator_parameters(config: Config, kind: str) -> int:
    """Learned values of one attention layer beside its projections."""
    n, g, d = config.model.heads, config.model.kv_groups, config.model.head_width
    section = config.dense if kind == "dense" else config.maha
    count = CONVOLUTION_TAPS * (n + 2 * g) * d if section.convolution else 0
    if kind != "dense" or config.dense.qk_norm:
        count += (n + g) * d
    levels = 1 if kind == "dense" else len(maha_windows(config, kind))
    if levels == 1:
        return count
    return count + _scale_parameters(config, levels, levels + (kind == "refined"))


def _scale_parameters(config: Config, levels: int, branches: int) -> int:
    """Learned values that only several scales have: pyramid, key maps, utilities, coupling, game. `branches`: the
    scales that are fused, opened keys among them.
    """
    n, g, d = config.model.heads, config.model.kv_groups, config.model.head_width
    maha = config.maha
    per_summary = {"gated": d + maha.ratio, "conv": d * maha.ratio, "mean": 0, "max": 0}[maha.downsampling]
    count = (levels - 1) * 2 * g * per_summary
    if maha.key_map:
        count += (levels - 1) * g * d * d
    if maha.aggregation != "mean":
        count += branches * n * (d + 1)
    if maha.coupling == "gram":
        count += n
    if maha.aggregation == "nash":
        count += n * branches * (branches - 1) // 2
    return count


# ------------------------------------------------------------------------------------------------- attention operator


def attention_flops(config: Config, sequence_tokens: int) -> dict[str, dict[str, float]]:
    """Forward operations of the attention operator of one layer, for one sequence of one document.

    Args:
        sequence_tokens: rows of the sequence; windows are those of the configuration.

    Returns:
        {kind of layer: {term: FLOP}}: maha and dense, whether or not the model has such layers, and refined where it
        has.
    """
    n, g, d = config.model.heads, config.model.kv_groups, config.model.head_width
    rows = sequence_tokens
    refined = {"refined": _maha_flops(config, rows, "refined")} if "refined" in config.model.attention else {}
    return {
        "maha": _maha_flops(config, rows, "maha"),
        **refined,
        "dense": {
            "scores_and_values": 4 * d * n * (rows * (rows + 1) // 2),
            "rope": ROPE_FLOPS_PER_ELEMENT * d * (n + g) * rows,
            "convolution": _convolution_flops(config, rows) if config.dense.convolution else 0,
        },
    }


def _maha_flops(config: Config, rows: int, kind: str) -> dict[str, float]:
    """Terms of a layer of kind maha or refined."""
    n, g, d = config.model.heads, config.model.kv_groups, config.model.head_width
    levels, maha = len(maha_windows(config, kind)), config.maha
    branches = levels + (kind == "refined")
    blocks = _blocks(config, rows, kind)
    children = maha.ratio * sum(blocks[1:])
    per_child = {"gated": 4 * d + 1, "conv": 2 * d, "mean": d, "max": d}[maha.downsampling]
    pooled = maha.queries == "pooled"
    queries = sum(blocks) if pooled else rows * (levels if maha.rope_unit == "block" else 1)
    fused = rows * n if levels > 1 else 0
    utility = 0 if maha.aggregation == "mean" else branches * (2 * d + 1 + maha.lse_utility)
    solver = solver_flops(branches, aggregation=maha.aggregation, regularizer=maha.regularizer, coupling=maha.coupling)
    terms = {
        "scores_and_values": 4 * d * n * _pairs(config, rows, kind, scales.visible_pairs),
        "rope": ROPE_FLOPS_PER_ELEMENT * d * (n * queries + g * sum(blocks)),
        "convolution": _convolution_flops(config, rows) if maha.convolution else 0,
        "pyramid": 2 * g * per_child * children,
        "key_map": 2 * d * d * g * sum(blocks[1:]) if maha.key_map else 0,
        "pooled_queries": d * n * children if pooled else 0,
        "utilities": fused * utility,
        "gram": fused * gram_flops(branches, d) if maha.coupling == "gram" else 0,
        "solver": fused * solver,
        "combination": fused * branches * 2 * d,
    }
    if kind == "refined":
        openable = sum(count * blocks for count, blocks in _openable_spans(config, rows))
        terms["selection"] = openable * (n + (n - g) + config.refine.blocks * g)
    return terms


def _convolution_flops(config: Config, rows: int) -> int:
    n, g, d = config.model.heads, config.model.kv_groups, config.model.head_width
    return CONVOLUTION_FLOPS_PER_CHANNEL * (n + 2 * g) * d * rows


def _openable_spans(config: Config, rows: int) -> list[tuple[int, int]]:
    """(rows, blocks that each of them may open), over a document of `rows` rows."""
    refine = config.refine
    ratio, windows = config.maha.ratio, maha_windows(config, "refined")
    return list(scales.openable_spans(rows, ratio, windows, refine.from_scale, refine.to_scale))


def _blocks(config: Config, rows: int, kind: str) -> list[int]:
    """Complete blocks of each scale of a layer of kind maha or refined, in a document of `rows` rows."""
    strides = [scales.stride(config.maha.ratio, level) for level in range(len(maha_windows(config, kind)))]
    return [scales.complete_blocks(rows, stride) for stride in strides]


def _pairs(config: Config, rows: int, kind: str, count: Callable[..., list[int]]) -> int:
    """Pairs of a MAHA or refined layer as `count` (scales.visible_pairs or loaded_pairs) counts them, over all scales.

    Pooled queries pair blocks with blocks: within a scale it is a window over its blocks. Rows that open anything load
    all the blocks they could: a tile has the keys of one row and KV group.
    """
    ratio, windows, refine = config.maha.ratio, maha_windows(config, kind), config.refine
    if config.maha.queries == "pooled":
        blocks = _blocks(config, rows, kind)
        return sum(sum(count(number, ratio, (window,))) for number, window in zip(blocks, windows, strict=True))
    pairs = sum(count(rows, ratio, windows))
    if kind == "refined":
        spans = _openable_spans(config, rows)
        opened = {
            scales.visible_pairs: sum(number * min(blocks, refine.blocks) for number, blocks in spans),
            scales.loaded_pairs: sum(number * refine.blocks for number, blocks in spans if blocks),
        }[count]
        pairs += opened * scales.stride(ratio, refine.from_scale - refine.to_scale)
    return pairs


def attention_savings(config: Config) -> dict[str, Any]:
    """What the model's attention operators save against dense attention in every layer, at data.sequence_tokens.

    The dense side has the convolution if the model's MAHA layers have it, so that the saving is attention's alone.

    Returns:
        saved_frac_pairs (visible query-key pairs), saved_frac_loaded (pairs that 64-wide tiles execute, masked lanes
        included, against the tiles of dense), saved_frac_all_in, and per layer kind the visible and loaded pairs.
    """
    rows, ratio = config.data.sequence_tokens, config.maha.ratio
    kinds = layer_attention(config)
    flops = attention_flops(config, rows)
    operator = {kind: sum(terms.values()) for kind, terms in flops.items()}
    peer = dict(flops["dense"])
    if uses_maha(config):
        peer["convolution"] = flops["maha"]["convolution"]
    of_maha = [kind for kind in flops if kind != "dense"]
    visible = {kind: _pairs(config, rows, kind, scales.visible_pairs) for kind in of_maha}
    visible["dense"] = rows * (rows + 1) // 2
    loaded = {kind: _pairs(config, rows, kind, scales.loaded_pairs) for kind in of_maha}
    loaded["dense"] = sum(scales.loaded_pairs(rows, ratio, (rows,)))  # one scale that sees everything

    def saved(cost: dict[str, float], dense_cost: float) -> float:
        return 1 - sum(cost[kind] for kind in kinds) / (len(kinds) * dense_cost)

    return {
        "saved_frac_pairs": saved(visible, visible["dense"]),
        "saved_frac_loaded": saved(loaded, loaded["dense"]),
        "saved_frac_all_in": saved(operator, sum(peer.values())),
        "visible_pairs": visible,
        "loaded_pairs": loaded,
    }


# ------------------------------------------------------------------------------------------------------- whole model


def flops_per_token(config: Config) -> dict[str, float]:
    """Forward operations per token by term, over all layers; backward takes BACKWARD_PER_FORWARD times as many.

    Returns:
        qkv, attention_maha, attention_dense (operators, all-in; attention_refined where the model has such layers),
        attention_output, mlp, logits. Padding rows of the vocabulary do not count: nobody asked for their logits.
    """
    model, rows = config.model, config.data.sequence_tokens
    heads_width, groups_width = model.heads * model.head_width, model.kv_groups * model.head_width
    kinds = layer_attention(config)
    operator = {kind: sum(terms.values()) / rows for kind, terms in attention_flops(config, rows).items()}
    return {
        "qkv": 2.0 * model.layers * model.hidden * (heads_width + 2 * groups_width),
        **{f"attention_{kind}": kinds.count(kind) * flops for kind, flops in operator.items()},
        "attention_output": 2.0 * model.layers * model.hidden * heads_width,
        "mlp": 2.0 * model.layers * 3 * model.hidden * model.ffn_hidden,
        "logits": 2.0 * model.hidden * model.vocabulary,
    }


def training_flops_per_token(config: Config) -> float:
    """Operations of forward and backward per token, recomputation not counted: what MFU is stated with."""
    return (1 + BACKWARD_PER_FORWARD) * sum(flops_per_token(config).values())


def attention_flops_per_token(config: Config) -> float:
    """Forward operations of the attention operators (without projections) per token, over all layers."""
    terms = flops_per_token(config)
    return sum(terms.get(f"attention_{kind}", 0.0) for kind in ("maha", "refined", "dense"))


def attention_share(config: Config) -> float:
    """Share of the attention operators (without projections) in the operations of a step, 0 to 1."""
    return attention_flops_per_token(config) / sum(flops_per_token(config).values())


# ------------------------------------------------------------------------------------------------------------ memory


def memory_estimate(config: Config, world_size: int) -> dict[str, float]:
    """Bytes one rank holds throughout training; activations and the loss's chunk come on top.

    Args:
        world_size: all ranks of the run.

    Returns:
        weights, gradients, optimizer (master weights and moments), buckets, total.

    Sharding: tensor parallelism splits all but the norms; ZeRO splits the optimizer's state (stage 1), gradients (2)
    and weights (3) over the data-parallel ranks.
    """
    ranks, zero, counts = data_parallel_size(config, world_size), config.zero, parameter_counts(config)
    local = (sum(counts.values()) - counts["norms"]) / config.parallel.tensor + counts["norms"]
    width = 2 if config.train.precision == "bf16" else 4
    accumulated = 2 if config.train.precision == "bf16" and zero.accumulation_dtype == "bf16" else 4
    moments = 8 if config.optimizer.name == "adamw" else 0
    # below stage 2 a separate accumulator, where there is one, stands beside the gradients of the micro-batch
    beside = width if accumulated != width else 0
    gradients = accumulated / ranks if zero.stage >= 2 else accumulated + beside
    bucketed = zero.stage >= 2 or (zero.stage == 1 and accumulated == width)
    memory = {
        "weights": local * width / (ranks if zero.stage == 3 else 1),
        "gradients": local * gradients,
        "optimizer": local * ((4 + moments) / ranks if zero.stage else moments),
        "buckets": float(zero.bucket_elements * width * (2 if zero.overlap else 1)) if bucketed else 0.0,
    }
    return memory | {"total": sum(memory.values())}
