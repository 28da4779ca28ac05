"""One transformer layer as a megatron-core spec: pre-norm, attention of choice, SwiGLU, no biases, no dropout."""

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from maha_megatron.model.norms import RMSNorm
from maha_megatron.parallel import groups


def gated(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate and up side by side: [..., 2 f] to [..., f]."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGlu(MLP):
    """megatron-core's MLP as a plain class: the one form of the `mlp` field that every supported release builds.

    `activate` is what lies between its two products; compiled.py puts a fused form there.
    """

    def __init__(self, config, **_) -> None:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(
            config=config,
            submodules=linears,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=groups.tensor_group(),
        )
        self.activate = gated

    def forward(self, hidden: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
        """[t, 1, h] to [t, 1, h], and no bias."""
        both, _ = self.linear_fc1(hidden)
        return self.linear_fc2(self.activate(both))


def layer_spec(core_attention: ModuleSpec) -> ModuleSpec:
    """A layer around `core_attention` (a MahaCoreAttention or DenseCoreAttention with its operator spec in params)."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=core_attention,
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,  # the operators normalise queries and keys themselves, after the convolution
        k_layernorm=IdentityOp,
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=SwiGlu,
        mlp_bda=get_bias_dropout_add,
    )
    return ModuleSpec(module=TransformerLayer, submodules=layer)
