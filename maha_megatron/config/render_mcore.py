"""The one table from the configuration to megatron-core's TransformerConfig.

Values are plain: dtypes and the activation are names that model/ turns into torch objects. A field that is not listed
keeps megatron-core's default. Constants are listed where the default is wrong for us or decides what is computed.
"""

from typing import Any

from maha_megatron.config.schema import Config

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def transformer_config_fields(config: Config) -> dict[str, Any]:
    """Fields of TransformerConfig by name.

    Returns:
        Plain values; "params_dtype" is a name in torch ("bfloat16"), "activation_func" one in torch.nn.functional.
    """
    model = config.model
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_groups,
        "kv_channels": model.head_width,
        "ffn_hidden_size": model.ffn_hidden,
        # SwiGLU, RMSNorm, no bias, no dropout: the block is one decision of this project, so these have no keys
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # q/k norms belong to the attention operator, which applies them after its convolution
        "qk_layernorm": False,
        "tensor_model_parallel_size": config.parallel.tensor,
        "sequence_parallel": config.parallel.sequence,
        "params_dtype": DTYPES[config.train.precision],
        "bf16": config.train.precision == "bf16",
        # model/init.py overwrites every weight. megatron-core's own initialisation stays on all the same: without it
        # the linear layers never mark their weights as tensor parallel, and the gradient norm counts one rank's only.
        "perform_initialization": True,
        "use_cpu_initialization": True,
        # these fusions need Apex or CUDA
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "deterministic_mode": config.train.deterministic,
        **_recompute_fields(config.train.recompute),
    }


def _recompute_fields(recompute: str) -> dict[str, Any]:
    """What backward recomputes: "selective" the attention operator, "full" each layer from its input."""
    return {
        "recompute_granularity": None if recompute == "none" else recompute,
        "recompute_method": "uniform" if recompute == "full" else None,
        "recompute_num_layers": 1 if recompute == "full" else None,
        "recompute_modules": ["core_attn"] if recompute == "selective" else None,
    }
