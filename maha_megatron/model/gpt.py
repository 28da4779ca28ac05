"""The language model, assembled from megatron-core's parallel layers and our own loop, norm, attention and loss."""

import functools
import operator
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from maha_megatron.config.derive import layer_attention, padded_vocabulary
from maha_megatron.config.programs import states_program
from maha_megatron.config.schema import Config
from maha_megatron.errors import ConfigError
from maha_megatron.model.bounds import DocumentBounds
from maha_megatron.model.layer_specs import layer_spec
from maha_megatron.model.loss import OutputLayer
from maha_megatron.model.maha_core_attention import MahaCoreAttention
from maha_megatron.model.mcore_config import build_transformer_config
from maha_megatron.model.names import mark_shards
from maha_megatron.model.norms import RMSNorm
from maha_megatron.model.operators import core_attention_spec
from maha_megatron.model.solve_totals import SolveTotals
from maha_megatron.parallel import groups


class Gpt(nn.Module):
    """A causal language model over packed documents: always one flattened row of t tokens, never a batch dimension.

    Sharding: layers over the tensor axis as megatron-core does it; with sequence parallelism the residual stream is
    [t / tensor, 1, h] on each rank and t must be a multiple of the tensor-parallel size.
    """

    def __init__(self, config: Config, mcore_config: TransformerConfig, program: Callable | None = None) -> None:
        super().__init__()
        self.recompute_layers = config.train.recompute == "full"
        self.sequence_parallel = mcore_config.sequence_parallel
        self.embedding = VocabParallelEmbedding(
            num_embeddings=padded_vocabulary(config),
            embedding_dim=config.model.hidden,
            init_method=mcore_config.init_method,
            reduce_scatter_embeddings=self.sequence_parallel,
            config=mcore_config,
            tp_group=groups.tensor_group(),
        )
        specs = [layer_spec(core_attention_spec(config, kind, program)) for kind in layer_attention(config)]
        self.layers = nn.ModuleList(
            build_module(spec, config=mcore_config, layer_number=number) for number, spec in enumerate(specs, start=1)
        )
        self.final_norm = RMSNorm(mcore_config, config.model.hidden, eps=config.model.norm_epsilon)
        self.output = OutputLayer(
            mcore_config,
            vocabulary=config.model.vocabulary,
            padded_vocabulary=padded_vocabulary(config),
            chunk_tokens=config.model.loss_chunk_tokens,
            tied_weight=self.embedding.weight if config.model.tied_embeddings else None,
        )

    def forward(
        self,
        input_ids_t: torch.Tensor,
        labels_t: torch.Tensor | None,
        loss_mask_t: torch.Tensor | None,
        bounds: DocumentBounds,
    ) -> torch.Tensor:
        """The summed loss of one micro-batch, or its logits when there are no labels.

        Args:
            input_ids_t: int64 [t], packed samples.
            labels_t: int64 [t], the next token of each row.
            loss_mask_t: bool [t], True where the row's loss counts.
            bounds: document bounds (pass by keyword under DeepSpeed: its hooks look at positional arguments).

        Returns:
            fp32 scalar: the SUM of the unmasked rows' losses in nats, the same on every tensor-parallel rank.
        """
        return self.output(self.hidden(input_ids_t, bounds), labels_t, loss_mask_t)

    def hidden(self, input_ids_t: torch.Tensor, bounds: DocumentBounds) -> torch.Tensor:
        """What the output layer reads: [t, 1, h], normalised; under sequence parallelism [t / tensor, 1, h]."""
        hidden = self.embedding(input_ids_t[None])
        if not self.sequence_parallel:  # the sequence-parallel embedding has put the rows first already
            hidden = hidden.transpose(0, 1).contiguous()
        for layer in self.layers:
            hidden = self._run_layer(layer, hidden, bounds)
        return self.final_norm(hidden)

    def logits(self, input_ids_t: torch.Tensor, bounds: DocumentBounds) -> torch.Tensor:
        """fp32 logits [t, vocabulary], gathered over the tensor axis, padding cut off: for generation and tests."""
        return self(input_ids_t, None, None, bounds=bounds)

    @property
    def collect_scale_weights(self) -> bool:
        """Whether forward passes keep each MAHA layer's mean weight of each scale; set it to switch that on or off."""
        return any(attention.collect_scale_weights for attention in self._maha_attentions().values())

    @collect_scale_weights.setter
    def collect_scale_weights(self, enabled: bool) -> None:
        for attention in self._maha_attentions().values():
            attention.collect_scale_weights = enabled
            attention.scale_weights_l = None

    def scale_weights(self) -> dict[int, torch.Tensor]:
        """Mean weight of each scale over rows and all heads in the last forward, by layer: {layer index: fp32 [L]}.

        Empty unless `collect_scale_weights` was True in that forward. No host synchronisation.

        Sharding: averages over the tensor axis, so every rank of a tensor-parallel group calls it.
        """
        collected = {
            index: attention.scale_weights_l.clone()
            for index, attention in self._maha_attentions().items()
            if attention.scale_weights_l is not None
        }
        if groups.tensor_size() > 1:
            for mean_l in collected.values():
                dist.all_reduce(mean_l, group=groups.tensor_group())
                mean_l /= groups.tensor_size()
        return collected

    def solve_totals(self) -> SolveTotals | None:
        """Programs of the last forward over all layers, of this rank's heads; None where no layer solves any.

        No host synchronisation; nothing is exchanged between ranks. Ask once per forward: each one replaces the last,
        and so does the recomputation of activations, with the same.
        """
        layers = [attention.solve_totals for attention in self._maha_attentions().values()]
        solved = [totals for totals in layers if totals is not None]
        return functools.reduce(operator.add, solved) if solved else None

    def _run_layer(self, layer: nn.Module, hidden: torch.Tensor, bounds: DocumentBounds) -> torch.Tensor:
        def run(hidden: torch.Tensor) -> torch.Tensor:
            return layer(hidden, attention_mask=None, packed_seq_params=bounds)[0]

        if self.recompute_layers and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(run, False, hidden)
        return run(hidden)

    def _maha_attentions(self) -> dict[int, MahaCoreAttention]:
        attentions = {index: layer.self_attention.core_attention for index, layer in enumerate(self.layers)}
        return {index: module for index, module in attentions.items() if isinstance(module, MahaCoreAttention)}


def build_gpt(config: Config, *, device: torch.device | str, program: Callable | None = None) -> Gpt:
    """Build the model's shard of this rank; its weights are not drawn yet (init.initialise_parameters does that).

    Args:
        config: a checked configuration.
        device: where the parameters live; "meta" builds shapes only, for a dry run.
        program: what operators.stated_program gives for a configuration that states a program; a dry run needs none.

    Raises:
        ConfigError: the configuration states a program, and it was not given.

    The model-parallel groups must exist: compat.initialise_model_parallel, or compat.initialise_dry_run.
    """
    if states_program(config) and program is None and torch.device(device).type != "meta":
        raise ConfigError(f"maha.program: {config.maha.program} has to be loaded and given to build_gpt")
    with torch.device(device):
        model = Gpt(config, build_transformer_config(config), program)
    mark_shards(model)
    return model
