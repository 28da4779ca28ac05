"""The whole configuration as one frozen tree. YAML is data for this tree; nothing else defines a key.

Every leaf names its one owner: the room or rendered table that consumes it. Derived values (head counts per rank,
padded vocabulary, windows of a sequence) are never stored: config/derive.py computes them.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

OWNERS = ("config", "mcore", "deepspeed", "attention", "model", "parallel", "data", "train", "checkpoint")


def leaf(
    default: Any = MISSING,
    *,
    owner: str,
    help: str,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
) -> Any:
    """A configuration key: its default, the owner that consumes it, one sentence of help, and its simple bounds."""
    assert owner in OWNERS, owner
    metadata = {"owner": owner, "help": help, "choices": tuple(choices) if choices else None, "minimum": minimum}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = leaf("maha", owner="train", help="Name of the run in its records.")
    folder: str = leaf(
        "runs/maha", owner="train", help="Folder that receives checkpoints, metrics and TensorBoard logs."
    )
    seed: int = leaf(1234, owner="model", help="Seed of initial weights and of the data order.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Model:
    layers: int = leaf(12, owner="mcore", help="Transformer layers.", minimum=1)
    hidden: int = leaf(768, owner="mcore", help="Hidden width h.", minimum=1)
    heads: int = leaf(12, owner="mcore", help="Query heads n.", minimum=1)
    kv_groups: int = leaf(
        4, owner="mcore", help="Key/value groups g; heads / kv_groups query heads share one.", minimum=1
    )
    head_width: int = leaf(64, owner="mcore", help="Width d of a head; even.", minimum=2)
    ffn_hidden: int = leaf(2048, owner="mcore", help="Inner width of the SwiGLU block.", minimum=1)
    norm_epsilon: float = leaf(1e-5, owner="mcore", help="Epsilon inside the root of the layers' RMSNorm.", minimum=0)
    attention: tuple[str, ...] = leaf(
        ("maha",),
        owner="model",
        choices=("maha", "dense", "refined"),
        help="Attention of each layer, as a pattern repeated over the layers: [maha, maha, maha, dense] is the hybrid; "
        "refined is MAHA that also opens the blocks which matter to a row (section refine).",
    )
    vocabulary: int = leaf(32000, owner="model", help="Token ids the tokenizer can produce.", minimum=2)
    vocabulary_multiple: int = leaf(
        128,
        owner="model",
        minimum=1,
        help="The embedding is padded to a multiple of this; padding rows never receive probability.",
    )
    tied_embeddings: bool = leaf(False, owner="model", help="Use one matrix for the embedding and the output layer.")
    rope_base: float = leaf(10000.0, owner="attention", help="Base of the rotary position embedding.", minimum=1)
    init_std: float = leaf(
        0.02,
        owner="model",
        help="Standard deviation of initial weights; residual outputs get /sqrt(2 layers).",
        minimum=0,
    )
    embedding_init_std: float = leaf(
        0.2,
        owner="model",
        help="Standard deviation of the initial embedding; a tied one starts with init_std, as its output layer must.",
        minimum=0,
    )
    loss_chunk_tokens: int = leaf(
        2048, owner="model", minimum=1, help="Tokens whose fp32 logits exist at once while the loss is computed."
    )


@dataclass(frozen=True, kw_only=True)
class Maha:
    ratio: int = leaf(
        4, owner="attention", help="Rows of scale l-1 that a block of scale l summarises, 2 to 8.", minimum=2
    )
    windows: tuple[int, ...] = leaf(
        (),
        owner="attention",
        help="Complete blocks visible at each scale, finest first; empty: the default table for data.sequence_tokens.",
    )
    full_reach: bool = leaf(
        True,
        owner="config",
        help="Insist that every row can see back to its document's start, in refined layers, too; false where a plain "
        "sliding window is meant.",
    )
    downsampling: str = leaf(
        "gated",
        owner="attention",
        choices=("gated", "conv", "mean", "max"),
        help="How a block summarises its children: a learned softmax gate, a learned kernel, mean or maximum.",
    )
    key_map: bool = leaf(
        False, owner="attention", help="A learned d x d map of the pooled keys of every coarse scale, per KV group."
    )
    queries: str = leaf(
        "full",
        owner="attention",
        choices=("full", "pooled"),
        help="Queries of a coarse scale: every row's own, or the block's mean, shifted right (an ablation).",
    )
    aggregation: str = leaf(
        "convex",
        owner="attention",
        choices=("convex", "nash", "mean", "program"),
        help="How the scales' outputs are fused: a convex program, the Nash equilibrium of a game between the scales, "
        "equal weights, or a program of your own.",
    )
    regularizer: str = leaf(
        "entropy",
        owner="attention",
        choices=("entropy", "quadratic"),
        help="Of convex and nash: entropy gives every scale some weight, quadratic gives sparse weights.",
    )
    coupling: str = leaf(
        "none",
        owner="attention",
        choices=("none", "gram"),
        help="gram: scales with similar outputs share their weight (the Gram matrix of the outputs enters).",
    )
    program: str = leaf(
        "",
        owner="attention",
        help="For aggregation: program, module:function that states it with cvxpy (see configs/programs); runs only "
        "with --allow-program of that name, and takes 0.3-1.5 ms and 1-11 kB for every row and head of a layer.",
    )
    lse_utility: bool = leaf(
        True,
        owner="attention",
        help="Add each scale's log-sum-exp to its utility: all scales then share one softmax.",
    )
    convolution: bool = leaf(True, owner="attention", help="Causal dilated depthwise convolution on q, k and v.")
    rope_unit: str = leaf(
        "block",
        owner="attention",
        choices=("block", "token"),
        help="What rotary positions of a coarse scale count: its blocks, so that a step of every scale turns alike, or "
        "tokens, as at the finest.",
    )
    backend: str = leaf(
        "eager",
        owner="attention",
        choices=("naive", "eager", "triton"),
        help="Implementation: naive is the readable reference, eager the fast plain torch form, triton the kernels for "
        "GPUs, with eager for what none serves.",
    )


@dataclass(frozen=True, kw_only=True)
class Refine:
    """Of refined layers; all else of them is in section maha."""

    from_scale: int = leaf(
        2,
        owner="attention",
        help="Scale whose blocks are opened, by the attention that they get; its window bounds how far back they lie.",
        minimum=1,
    )
    to_scale: int = leaf(
        0,
        owner="attention",
        help="Scale whose keys an opened block gives: 0 for its tokens, else the summaries of that scale in it.",
        minimum=0,
    )
    blocks: int = leaf(
        4,
        owner="attention",
        help="Blocks that each row and KV group opens, of those beyond the window of to_scale; all, where fewer are.",
        minimum=1,
    )
    windows: tuple[int, ...] = leaf(
        (),
        owner="attention",
        help="Windows of refined layers, as maha.windows has them; empty: those of maha.windows.",
    )


@dataclass(frozen=True, kw_only=True)
class Dense:
    qk_norm: bool = leaf(
        True, owner="attention", help="RMS-normalise queries and keys of dense layers, per head, with a gain."
    )
    convolution: bool = leaf(
        True, owner="attention", help="Causal dilated depthwise convolution on q, k and v of dense layers."
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    prefix: str = leaf(owner="data", help="Path of a Megatron .bin/.idx pair without its ending.")
    weight: float = leaf(1.0, owner="data", help="Share of the samples, relative to the other sources.", minimum=0)
    epochs: float = leaf(
        0.0,
        owner="data",
        minimum=0,
        help="In place of weight, for every source of a list: passes over it relative to the others'. {epochs: 1} and "
        "{epochs: 3} read the second three times for every pass over the first.",
    )


@dataclass(frozen=True, kw_only=True)
class SkipRange:
    first: int = leaf(owner="data", help="Number of the first sample left out.", minimum=0)
    last: int = leaf(owner="data", help="Number of the last sample left out.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Data:
    sequence_tokens: int = leaf(4096, owner="data", help="Tokens s of one sample.", minimum=1)
    train: tuple[Source, ...] = leaf(
        (), owner="data", help="Training sources: list of {prefix, weight} or of {prefix, epochs}."
    )
    validation: tuple[Source, ...] = leaf(
        (),
        owner="data",
        help="Validation sources, with weights of their own; empty: the last documents of the training sources.",
    )
    validation_frac: float = leaf(
        0.02,
        owner="data",
        minimum=0,
        help="Share of each training source's documents kept for validation when data.validation is empty.",
    )
    tokenizer: str = leaf(
        "",
        owner="data",
        help="Path of the tokenizer: a SentencePiece .model, a tokenizer.json, a folder of Hugging Face, or one of a "
        "vocab.json with its merges.txt.",
    )
    packing: str = leaf(
        "concatenate",
        owner="data",
        choices=("concatenate", "best_fit"),
        help="concatenate: documents end to end, cut at every sample, as Megatron does; best_fit: only documents "
        "longer than a sample are cut, and samples may end in padding.",
    )
    skip: tuple[SkipRange, ...] = leaf(
        (),
        owner="data",
        help="Training samples to leave out, by their numbers in the order (tools/data.py explain shows them): list of "
        "{first, last}, both left out, ascending. Ranges that lie ahead may be added to a run.",
    )
    prefetch_steps: int = leaf(
        2,
        owner="train",
        minimum=0,
        help="Steps whose batches a background thread prepares ahead, in pinned memory where there is a GPU; 0: none.",
    )
    document_bounds: bool = leaf(
        True,
        owner="data",
        help="Attention, blocks, windows and positions restart at every document; false: only at samples.",
    )
    cache: str = leaf(
        "", owner="data", help="Folder of the sample indexes; empty: run.folder/index. Never share it with others."
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: str = leaf(
        "adamw", owner="train", choices=("adamw", "sgd"), help="Optimizer; sgd (no momentum) is for equality tests."
    )
    beta1: float = leaf(0.9, owner="train", help="AdamW's first moment decay.", minimum=0)
    beta2: float = leaf(0.95, owner="train", help="AdamW's second moment decay.", minimum=0)
    epsilon: float = leaf(1e-8, owner="train", help="AdamW's epsilon.", minimum=0)
    weight_decay: float = leaf(
        0.1,
        owner="train",
        help="AdamW's decoupled weight decay of matrices; 1-D and MAHA parameters get none, and sgd never decays.",
        minimum=0,
    )
    clip_norm: float = leaf(
        1.0, owner="deepspeed", help="Clip the global gradient norm to this; 0: no clipping.", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    kind: str = leaf(
        "cosine", owner="train", choices=("cosine", "wsd", "constant"), help="Learning-rate schedule after the warm-up."
    )
    peak: float = leaf(3e-4, owner="train", help="Learning rate at the end of the warm-up.", minimum=0)
    final: float = leaf(3e-5, owner="train", help="Learning rate at the last step (cosine, wsd).", minimum=0)
    warmup_steps: int = leaf(100, owner="train", help="Steps of linear warm-up from 0.", minimum=0)
    decay_steps: int = leaf(0, owner="train", help="wsd only: steps of the final linear decay.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = leaf(1000, owner="train", help="Optimizer steps of the run.", minimum=1)
    global_batch_samples: int = leaf(8, owner="train", help="Samples of one optimizer step over all ranks.", minimum=1)
    micro_batch_samples: int = leaf(1, owner="deepspeed", help="Samples one rank processes at once.", minimum=1)
    precision: str = leaf(
        "bf16", owner="deepspeed", choices=("fp32", "bf16"), help="Compute dtype; bf16 keeps fp32 master weights."
    )
    recompute: str = leaf(
        "none",
        owner="mcore",
        choices=("none", "selective", "full"),
        help="Activations recomputed in backward: none, attention only, whole layers.",
    )
    compile: bool = leaf(
        False,
        owner="train",
        help="Fuse RMSNorm and the memory-bound pieces of SwiGLU and loss by torch.compile; the first step waits. With "
        "cuda_graphs not RMSNorm, whose fused form asks more of the host.",
    )
    cuda_graphs: bool = leaf(
        False,
        owner="train",
        help="Replay MAHA layers as CUDA graphs: frees the host where it is slower than the GPU; costs memory.",
    )
    deterministic: bool = leaf(False, owner="train", help="Bitwise reproducible kernels only; slower on a GPU.")
    validation_interval_steps: int = leaf(
        100, owner="train", help="Validate every so many steps and at the end; 0: only at the end.", minimum=0
    )
    validation_samples: int = leaf(64, owner="data", help="Samples of one validation.", minimum=1)
    log_interval_steps: int = leaf(10, owner="train", help="Write metrics every so many steps.", minimum=1)
    peak_tflops: float = leaf(
        0.0,
        owner="train",
        help="Peak TFLOP/s of one device that MFU is stated against; 0: look it up by the device's name.",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    tensor: int = leaf(
        1,
        owner="mcore",
        help="Ranks that share each layer (tensor parallel); divides heads, groups, vocabulary.",
        minimum=1,
    )
    sequence: bool = leaf(
        False, owner="mcore", help="Megatron sequence parallelism: norms and residuals split over the tensor ranks."
    )
    timeout_minutes: float = leaf(
        10.0, owner="parallel", help="A collective that waits longer ends the run.", minimum=0.1
    )


@dataclass(frozen=True, kw_only=True)
class Zero:
    stage: int = leaf(1, owner="deepspeed", help="DeepSpeed ZeRO stage: 0 (fp32 only), 1, 2 or 3.", minimum=0)
    accumulation_dtype: str = leaf(
        "fp32", owner="deepspeed", choices=("fp32", "bf16"), help="Dtype in which gradients are accumulated."
    )
    communication_dtype: str = leaf(
        "fp32", owner="deepspeed", choices=("fp32", "bf16"), help="Dtype in which gradients are reduced over ranks."
    )
    bucket_elements: int = leaf(
        50_000_000, owner="deepspeed", help="Elements reduced or gathered in one collective.", minimum=1
    )
    overlap: bool = leaf(False, owner="deepspeed", help="Overlap gradient reduction with backward.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    interval_steps: int = leaf(
        500, owner="checkpoint", help="Save every so many steps and at the end; 0: only at the end.", minimum=0
    )
    keep: int = leaf(
        2, owner="checkpoint", help="Checkpoints kept; older ones are removed after a successful save.", minimum=1
    )
    resume: bool = leaf(
        True, owner="checkpoint", help="Continue from the newest checkpoint in run.folder if there is one."
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    maha: Maha = field(default_factory=Maha)
    refine: Refine = field(default_factory=Refine)
    dense: Dense = field(default_factory=Dense)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    zero: Zero = field(default_factory=Zero)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
