"""Parameters, floating-point operations and memory from the configuration alone; torch-free, asserted by tests.

Counting rules of operations. A multiplication and an addition are one operation each; a product with a weight matrix is
2 per weight and token. The attention operator is counted all-in, on MAHA's and on dense's side alike:
    both        score and value products of the visible pairs, RoPE (3 per turned element, at every scale), convolution
                (6 for three taps, 1 for the product in silu, 1 for the sum, per channel)
    MAHA        pyramid (a child of K or V: 4d + 1 with a gate, 2d + 1 of it for its score; 2d with a kernel, 2 per
                weight; d for a mean or a maximum), key map (2d^2 per block), pooled queries (d per child),
                utilities (2d + 1, + 1 with LSE, per scale; none for equal weights), Gram matrix (2d per pair of scales
                i <= j) and solver (aggregation_cost.py), combination of the scales (2d per scale)
    neither     exponentials, norms, projections
Under grouped queries, products, query RoPE, utilities, Gram, solver and combination are counted per query head; key
RoPE, pyramid and key map per KV group, for dense as for MAHA. Pooled queries attend once per block: visible pairs are
then pairs of blocks. A sequence is one document, the most expensive case. Not counted: the solver of a stated program.
"""

from collections.abc import Callable
from typing import Any

from maha_megatron import scales
from maha_megatron.config.aggregation_cost import gram_flops, solver_flops
from maha_megatron.config.derive import data_parallel_size, layer_attention, maha_windows, padded_vocabulary
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
    operator = {kind: _operator_parameters(config, kind) for kind in ("maha", "dense")}
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
    section = config.maha if kind == "maha" else config.dense
    count = CONVOLUTION_TAPS * (n + 2 * g) * d if section.convolution else 0
    if kind == "maha" or config.dense.qk_norm:
        count += (n + g) * d
    levels = len(maha_windows(config))
    return count + (_scale_parameters(config, levels) if kind == "maha" and levels > 1 else 0)


def _scale_parameters(config: Config, levels: int) -> int:
    """Learned values that only several scales have: pyramid, key maps, utilities, coupling, game."""
    n, g, d = config.model.heads, config.model.kv_groups, config.model.head_width
    maha = config.maha
    per_summary = {"gated": d + maha.ratio, "conv": d * maha.ratio, "mean": 0, "max": 0}[maha.downsampling]
    count = (levels - 1) * 2 * g * per_summary
    if maha.key_map:
        count += (levels - 1) * g * d * d
    if maha.aggregation != "mean":
        count += levels * n * (d + 1)
    if maha.coupling == "gram":
        count += n
    if maha.aggregation == "nash":
        count += n * levels * (levels - 1) // 2
    return count


# ------------------------------------------------------------------------------------------------- attention operator


def attention_flops(config: Config, sequence_tokens: int) -> dict[str, dict[str, float]]:
    """Forward operations of the attention operator of one layer, for one sequence of one document.

    Args:
        sequence_tokens: rows of the sequence; windows are those of the configuration.

    Returns:
        {"maha": {term: FLOP}, "dense": {term: FLOP}}, both whether or not the model has such layers.
    """
    n, g, d = config.model.heads, config.model.kv_groups, config.model.head_width
    rows, levels, maha = sequence_tokens, len(maha_windows(config)), config.maha
    blocks = _blocks(config, rows)
    convolution = CONVOLUTION_FLOPS_PER_CHANNEL * (n + 2 * g) * d * rows
    children = maha.ratio * sum(blocks[1:])
    per_child = {"gated": 4 * d + 1, "conv": 2 * d, "mean": d, "max": d}[maha.downsampling]
    pooled = maha.queries == "pooled"
    queries = sum(blocks) if pooled else levels * rows
    fused = rows * n if levels > 1 else 0
    utility = 0 if maha.aggregation == "mean" else levels * (2 * d + 1 + maha.lse_utility)
    solver = solver_flops(levels, aggregation=maha.aggregation, regularizer=maha.regularizer, coupling=maha.coupling)
    return {
        "maha": {
            "scores_and_values": 4 * d * n * _maha_pairs(config, rows, scales.visible_pairs),
            "rope": ROPE_FLOPS_PER_ELEMENT * d * (n * queries + g * sum(blocks)),
            "convolution": convolution if maha.convolution else 0,
            "pyramid": 2 * g * per_child * children,
            "key_map": 2 * d * d * g * sum(blocks[1:]) if maha.key_map else 0,
            "pooled_queries": d * n * children if pooled else 0,
            "utilities": fused * utility,
            "gram": fused * gram_flops(levels, d) if maha.coupling == "gram" else 0,
            "solver": fused * solver,
            "combination": fused * levels * 2 * d,
        },
        "dense": {
            "scores_and_values": 4 * d * n * (rows * (rows + 1) // 2),
            "rope": ROPE_FLOPS_PER_ELEMENT * d * (n + g) * rows,
            "convolution": convolution if config.dense.convolution else 0,
        },
    }


def _blocks(config: Config, rows: int) -> list[int]:
    """Complete blocks of each scale in a document of `rows` rows."""
    strides = [scales.stride(config.maha.ratio, level) for level in range(len(maha_windows(config)))]
    return [scales.complete_blocks(rows, stride) for stride in strides]


def _maha_pairs(config: Config, rows: int, count: Callable[..., list[int]]) -> int:
    """Pairs of a MAHA layer as `count` (scales.visible_pairs or loaded_pairs) counts them, over all scales.

    Pooled queries pair blocks with blocks: within a scale it is a window over its blocks.
    """
    ratio, windows = config.maha.ratio, maha_windows(config)
    if config.maha.queries == "full":
        return sum(count(rows, ratio, windows))
    blocks = _blocks(config, rows)
    return sum(sum(count(number, ratio, (window,))) for number, window in zip(blocks, windows, strict=True))


def attention_savings(config: Config) -> dict[str, Any]:
    """What the model's attention operators save against dense attention in every layer, at data.sequence_tokens.

    The dense side has the convolution if the model's MAHA layers have it, so that the saving is attention's alone.

    Returns:
        saved_frac_pairs (visible query-key pairs), saved_frac_loaded (pairs that 64-wide tiles execute, masked lanes
        included, against the tiles of dense), saved_frac_all_in, and per layer kind the visible and loaded pairs.
    """
    rows, ratio = config.data.sequence_tokens, config.maha.ratio
    kinds = layer_attention(config)
    operator = {kind: sum(terms.values()) for kind, terms in attention_flops(config, rows).items()}
    peer = attention_flops(config, rows)["dense"]
    if "maha" in kinds:
        peer["convolution"] = attention_flops(config, rows)["maha"]["convolution"]
    visible = {"maha": _maha_pairs(config, rows, scales.visible_pairs), "dense": rows * (rows + 1) // 2}
    loaded = {
        "maha": _maha_pairs(config, rows, scales.loaded_pairs),
        "dense": sum(scales.loaded_pairs(rows, ratio, (rows,))),  # one scale that sees everything
    }

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
        qkv, attention_maha, attention_dense (operators, all-in), attention_output, mlp, logits. Padding rows of the
        vocabulary do not count: nobody asked for their logits.
    """
    model, rows = config.model, config.data.sequence_tokens
    heads_width, groups_width = model.heads * model.head_width, model.kv_groups * model.head_width
    kinds = layer_attention(config)
    operator = {kind: sum(terms.values()) / rows for kind, terms in attention_flops(config, rows).items()}
    return {
        "qkv": 2.0 * model.layers * model.hidden * (heads_width + 2 * groups_width),
        "attention_maha": kinds.count("maha") * operator["maha"],
        "attention_dense": kinds.count("dense") * operator["dense"],
        "attention_output": 2.0 * model.layers * model.hidden * heads_width,
        "mlp": 2.0 * model.layers * 3 * model.hidden * model.ffn_hidden,
        "logits": 2.0 * model.hidden * model.vocabulary,
    }


def training_flops_per_token(config: Config) -> float:
    """Operations of forward and backward per token, recomputation not counted: what MFU is stated with."""
    return (1 + BACKWARD_PER_FORWARD) * sum(flops_per_token(config).values())


def attention_share(config: Config) -> float:
    """Share of the attention operators (without projections) in the operations of a step, 0 to 1."""
    terms = flops_per_token(config)
    return (terms["attention_maha"] + terms["attention_dense"]) / sum(terms.values())


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
