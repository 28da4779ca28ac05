"""transformers' LlamaForCausalLM in the shape of a configuration: what our dense model is calibrated against.

The same tokens, micro-batches and accumulation; torch's SDPA without a mask; the model compiled as a whole. Its
optimizer step does what ours does: gradients into fp32, clipping by their norm, AdamW (fused on a GPU) on fp32 masters,
weights written back in the compute dtype. Each step waits for its loss, as ours does.
"""

import time

import torch

from maha_megatron.config.derive import padded_vocabulary
from maha_megatron.config.render_mcore import DTYPES
from maha_megatron.config.schema import Config
from maha_megatron.errors import ConfigError, EnvironmentMismatch
from maha_megatron.train.optimizer import hyperparameters
from maha_megatron.train.random_batches import random_batches


def check_comparable(config: Config, processes: int) -> None:
    """Raises ConfigError where the two would not do the same work."""
    wrong = []
    if config.data.document_bounds:
        wrong.append("data.document_bounds=false (Llama attends over whole samples)")
    if config.train.recompute != "none":
        wrong.append("train.recompute=none (Llama keeps its activations)")
    if config.optimizer.name != "adamw":
        wrong.append("optimizer.name=adamw")
    if processes > 1:
        wrong.append("one process")
    if wrong:
        raise ConfigError(f"a calibration against Llama needs {', '.join(wrong)}: set them in every run")


def llama_step_s(config: Config, steps: int, compiled: bool = True) -> list[float]:
    """Seconds of each of `steps` optimizer steps; the first ones compile.

    Raises:
        ConfigError: `check_comparable`.
        EnvironmentMismatch: transformers is not installed.
    """
    check_comparable(config, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(config, device)
    optimizer = MasterOptimizer(config, model)
    run = torch.compile(model) if compiled else model
    samples, length = config.train.micro_batch_samples, config.data.sequence_tokens
    batches = [batch.input_ids_t.view(samples, length).to(device) for batch in random_batches(config)]
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        for ids in batches:
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(batches)).backward()
            optimizer.accumulate()
        optimizer.step()
        loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return taken


def _model(config: Config, device: torch.device) -> torch.nn.Module:
    try:
        from transformers import AutoModelForCausalLM, LlamaConfig
    except ImportError as error:
        raise EnvironmentMismatch("calibration runs transformers' Llama: pip install 'maha-megatron[hf]'") from error
    model = config.model
    shape = LlamaConfig(
        vocab_size=padded_vocabulary(config),
        hidden_size=model.hidden,
        intermediate_size=model.ffn_hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_groups,
        head_dim=model.head_width,
        max_position_embeddings=config.data.sequence_tokens,
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=model.tied_embeddings,
    )
    with device:
        llama = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
    return llama.to(device, getattr(torch, DTYPES[config.train.precision])).train()


class MasterOptimizer:
    """AdamW on fp32 copies of a model's weights, with accumulated fp32 gradients and clipping."""

    def __init__(self, config: Config, model: torch.nn.Module) -> None:
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._masters = [weight.detach().float().clone() for weight in self._weights]
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        self._clip_norm, rate = config.optimizer.clip_norm, config.schedule.peak
        options = hyperparameters(config.optimizer, decays=True)
        self._adamw = torch.optim.AdamW(self._masters, lr=rate, fused=self._masters[0].is_cuda, **options)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the weights' gradients to the masters' and drop them."""
        torch._foreach_add_([master.grad for master in self._masters], [weight.grad for weight in self._weights])
        for weight in self._weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Clip, change the masters, write the weights, clear the gradients."""
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._masters, self._clip_norm)
        self._adamw.step()
        torch._foreach_copy_(self._weights, self._masters)
        torch._foreach_zero_([master.grad for master in self._masters])
