"""The engine: DeepSpeed around the model. No other module of the package trains through DeepSpeed.

How one step is scaled (deepspeed/runtime/engine.py, zero/stage_1_and_2.py, zero/stage3.py of 0.19.8):
`engine.backward(x)` divides x by the accumulation steps, gradients add up over micro-batches, and the reduction divides
by the data-parallel ranks. So each micro-batch hands over

    loss_sum * accumulation * data_parallel / count        count: unmasked tokens of the step over all ranks

and the gradient is that of sum(losses) / count at every topology, micro-batch size and accumulation.

A norm that is not finite makes the step() of every ZeRO optimizer, BF16_Optimizer included, return before it touches a
weight; `was_step_applied` tells. Without ZeRO there is neither such a check nor a norm: `_plain_gradient_norm` is both.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from maha_megatron.checkpoint.agreement import Failures
from maha_megatron.config.derive import accumulation_steps, micro_batch_tokens
from maha_megatron.config.render_deepspeed import deepspeed_config
from maha_megatron.config.schema import Config
from maha_megatron.data.batch import MicroBatch
from maha_megatron.errors import CheckpointError, TrainingError
from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.captured import capture_attention
from maha_megatron.model.compiled import compile_pieces
from maha_megatron.model.gpt import Gpt, build_gpt
from maha_megatron.model.init import initialise_parameters
from maha_megatron.model.names import full_shape, logical_names, merge_shards
from maha_megatron.model.solve_totals import SolveCounts, SolveTotals
from maha_megatron.parallel import compat, groups
from maha_megatron.parallel.gradients import sum_partial_gradients
from maha_megatron.parallel.mpu import Mpu
from maha_megatron.train.engine_files import CarefulFiles
from maha_megatron.train.guards import StepPlace, check_finite, not_finite
from maha_megatron.train.optimizer import build_optimizer, set_hyperparameters


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step measured; the same on every rank.

    Attributes:
        loss_nats: sum of the unmasked tokens' losses / their count, over all ranks and micro-batches.
        gradient_norm: global norm before clipping.
        learning_rate: as the optimizer had it.
        scale_weights: mean weight of each scale by layer, if it was asked for.
    """

    loss_nats: float
    gradient_norm: float
    learning_rate: float
    scale_weights: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Losses of a validation in nats per unmasked token; the same on every rank.

    Attributes:
        loss_nats: over all samples.
        by_source_nats: over those of each source that has a token to predict.
    """

    loss_nats: float
    by_source_nats: dict[str, float]


class Engine:
    """Steps, evaluates, saves and restores one model on this rank; every method is collective over all ranks."""

    def __init__(self, config: Config, inner: deepspeed.DeepSpeedEngine, device: torch.device) -> None:
        self._config, self._inner, self._device = config, inner, device
        self._parameters = logical_names(inner.module)
        self._captured = False  # whether layers replay CUDA graphs: from the first step on, parameters lie still
        self._solves: SolveTotals | None = None  # of all forward passes since `take_solves`
        # each micro-batch's loss is multiplied by this / count: see above
        self._averaged = accumulation_steps(config, dist.get_world_size()) * groups.data_size()

    @property
    def optimizer_class(self) -> str:
        """Class that DeepSpeed chose around the torch optimizer; precision and ZeRO stage decide it."""
        return f"{type(self._inner.optimizer).__name__} around {type(self._inner.basic_optimizer).__name__}"

    @property
    def module(self) -> Gpt:
        """The model of this rank."""
        return self._inner.module

    # ---------------------------------------------------------------------------------------------- one step

    def step(
        self,
        batches: Sequence[MicroBatch],
        learning_rate: float,
        place: StepPlace,
        *,
        with_scale_weights: bool = False,
    ) -> StepResult:
        """One optimizer step.

        Args:
            batches: this data-parallel rank's micro-batches of the step, one per accumulation step.
            learning_rate: set into the optimizer before the weights change.
            place: which step it is; named in errors.
            with_scale_weights: also measure the weight of each scale, on the last micro-batch.

        Raises:
            TrainingError: the loss or the gradient norm is not finite; the weights are as before.
        """
        loss = self.accumulate(batches, with_scale_weights=with_scale_weights)
        if not math.isfinite(loss):
            raise not_finite(loss, "loss", place, self._where(batches))
        norm, applied_rate = self.update(learning_rate, place)
        return StepResult(
            loss_nats=loss,
            gradient_norm=norm,
            learning_rate=applied_rate,
            scale_weights=self._mean_scale_weights() if with_scale_weights else {},
        )

    def update(self, learning_rate: float, place: StepPlace) -> tuple[float, float]:
        """Let the accumulated gradients change the weights.

        Returns:
            The gradient norm before clipping, and the learning rate as the optimizer had it.

        Raises:
            TrainingError: the norm is not finite; the weights are as before.
        """
        norm = self._plain_gradient_norm() if self._config.zero.stage == 0 else None
        if norm is not None:
            check_finite(norm, "gradient norm", place)
        for group in self._inner.optimizer.param_groups:
            group["lr"] = learning_rate
        self._inner.step()
        if norm is None:
            norm = float(self._inner.get_global_grad_norm())
            check_finite(norm if self._inner.was_step_applied() else float("nan"), "gradient norm", place)
        return norm, self._inner.get_lr()[0]

    def accumulate(self, batches: Sequence[MicroBatch], *, with_scale_weights: bool = False) -> float:
        """Forward and backward of one step's micro-batches: gradients are reduced, weights untouched.

        Returns:
            The step's loss in nats per unmasked token.
        """
        if self._config.train.cuda_graphs and not self._captured:
            capture_attention(self._inner.module, micro_batch_tokens(self._config))
            self._captured = True
        count = torch.tensor(sum(batch.unmasked for batch in batches), dtype=torch.float64, device=self._device)
        dist.all_reduce(count, group=groups.data_group())
        scale = (self._averaged / count).float()
        losses = []
        for number, batch in enumerate(batches, start=1):
            if number > 1:
                self._inner.step()  # only counts the micro-batch: the weights change at the accumulation's end
            self._inner.module.collect_scale_weights = with_scale_weights and number == len(batches)
            loss_sum = self._loss_sum(batch)
            self._inner.backward(loss_sum * scale)
            losses.append(loss_sum.detach())
        self._losses = torch.stack(losses)
        total = self._losses.double().sum()
        dist.all_reduce(total, group=groups.data_group())
        if count.item() == 0:
            raise TrainingError("no token of the whole batch may be predicted: every label is masked")
        return (total / count).item()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[str, MicroBatch]]) -> Evaluation:
        """Losses over all data-parallel ranks' batches, weights untouched.

        Args:
            batches: each with the name of its source; every rank gives equally many of each name, in the same order.
        """
        totals: dict[str, torch.Tensor] = {}
        self._inner.eval()
        for name, batch in batches:
            total = totals.setdefault(name, torch.zeros(2, dtype=torch.float64, device=self._device))
            total[0] += self._loss_sum(batch)
            total[1] += batch.unmasked
        self._inner.train()
        total_n2 = torch.stack(list(totals.values()))
        dist.all_reduce(total_n2, group=groups.data_group())
        loss_sum, count = total_n2.sum(0).tolist()
        if count == 0:
            raise TrainingError("the validation samples have no token that may be predicted")
        by_source = {name: total / n for name, (total, n) in zip(totals, total_n2.tolist(), strict=True) if n}
        return Evaluation(loss_nats=loss_sum / count, by_source_nats=by_source)

    def _loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self._device, non_blocking=True)

        bounds = document_bounds(batch.document_start_t, self._device)
        loss_sum = self._inner(moved(batch.input_ids_t), moved(batch.labels_t), moved(batch.loss_mask_t), bounds=bounds)
        totals = self._inner.module.solve_totals()  # before backward, which may run the layers again
        if totals is not None:
            self._solves = totals if self._solves is None else self._solves + totals
        return loss_sum

    def take_solves(self) -> SolveCounts | None:
        """How well the programs of the scales' weights were solved in all forward passes since the last call.

        Validation is counted too. None where no layer solves any: their weights are a formula.
        """
        totals, self._solves = self._solves, None
        return None if totals is None else totals.over_all_ranks()

    def _where(self, batches: Sequence[MicroBatch]) -> str:
        """Which of this rank's micro-batches have a loss that is not finite; for an error's text."""
        bad = [str(1 + number) for number, loss in enumerate(self._losses.tolist()) if not math.isfinite(loss)]
        where = f" (data-parallel rank {groups.data_rank()}: micro-batch {', '.join(bad)} of {len(batches)})"
        return where if bad else ""

    def _mean_scale_weights(self) -> dict[int, list[float]]:
        weights = self._inner.module.scale_weights()
        self._inner.module.collect_scale_weights = False
        if not weights:
            return {}
        mean = torch.cat(list(weights.values()))  # of all layers that have scales; refined ones have one weight more
        dist.all_reduce(mean, group=groups.data_group())
        by_layer = (mean / groups.data_size()).split([len(mean_l) for mean_l in weights.values()])
        return {layer: mean_l.tolist() for layer, mean_l in zip(weights, by_layer, strict=True)}

    def _plain_gradient_norm(self) -> float:
        """Norm of the reduced gradients without ZeRO; a parameter that every tensor rank holds whole counts once."""
        first = groups.tensor_rank() == 0
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        for parameter in self._parameters.values():
            if first or getattr(parameter, "tensor_model_parallel", False):
                square += parameter.grad.double().square().sum()
        dist.all_reduce(square, group=groups.tensor_group())
        return square.sqrt().item()

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        flags = torch.tensor(int(flag), device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    # ---------------------------------------------------------------------------------------------- whole tensors

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the model's parameters."""
        return next(iter(self._parameters.values())).dtype

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every parameter by logical name."""
        return {
            name: full_shape(name, getattr(parameter, "ds_shape", parameter.shape), groups.tensor_size())
            for name, parameter in self._parameters.items()
        }

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every parameter, whole, in the model's dtype, one at a time; None on ranks other than 0."""
        for name, parameter in self._parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, self._whole(name, parameter.detach())

    def full_masters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """As `full_weights`, in the fp32 that the optimizer updates."""
        for name, parameter in self._parameters.items():
            master = parameter if self._config.zero.stage == 0 else safe_get_full_fp32_param(parameter)
            yield name, self._whole(name, master.detach())

    def full_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """As `full_weights`: the gradients that `accumulate` left, reduced, before clipping."""
        for name, parameter in self._parameters.items():
            yield name, self._whole(name, safe_get_full_grad(parameter).detach())

    def _whole(self, name: str, shard: torch.Tensor) -> torch.Tensor | None:
        ranks = groups.tensor_size()
        shards = [torch.empty_like(shard) for _ in range(ranks)]
        dist.all_gather(shards, shard.contiguous(), group=groups.tensor_group())
        return merge_shards(name, shards) if dist.get_rank() == 0 else None

    # ---------------------------------------------------------------------------------------------- saving

    def write_state(self, folder: Path) -> Exception | None:
        """Write DeepSpeed's own state; this rank's first error is returned, so that no rank leaves a barrier."""
        files, failures = self._inner.checkpoint_engine, Failures()
        self._inner.checkpoint_engine = CarefulFiles(files, failures)
        try:
            self._inner.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        finally:
            self._inner.checkpoint_engine = files
        return failures.first

    def read_state(self, folder: Path) -> None:
        """Restore what `write_state` wrote; the configuration's hyperparameters win over the stored ones.

        Raises:
            CheckpointError: DeepSpeed could not read it.
        """
        try:
            loaded, _ = self._inner.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        except (OSError, RuntimeError, KeyError, AssertionError, ValueError) as error:
            raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
        if loaded is None:
            raise CheckpointError(f"{folder} cannot be read: DeepSpeed found no state in it")
        set_hyperparameters(self._inner.optimizer.param_groups, self._config.optimizer)

    def release(self) -> None:
        """Take DeepSpeed's hooks off the model, so that another engine can be built in this process."""
        self._inner.destroy()


def build_engine(config: Config, program: Callable | None = None) -> Engine:
    """Model, optimizer and DeepSpeed engine of this rank. The process groups must be up (parallel/compat).

    Args:
        config: a configuration that passed check_config and check_topology.
        program: what operators.stated_program gives for it.
    """
    device = compat.compute_device()
    settings = deepspeed_config(config, dist.get_world_size())
    partitioned = config.zero.stage == 3
    construction = contextlib.nullcontext()
    if partitioned:
        # without the group, parameters would be spread over tensor ranks too, and training silently wrong
        construction = deepspeed.zero.Init(
            data_parallel_group=groups.data_group(), config_dict_or_path=settings, mpu=Mpu()
        )
    with construction:
        model = build_gpt(config, device=device, program=program)
    if config.train.compile:
        compile_pieces(model, device, norms=not config.train.cuda_graphs)
    initialise_parameters(model, config, gather=_gathered_for_writing)
    sum_partial_gradients(model)
    optimizer = build_optimizer(config.optimizer, logical_names(model))
    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints the memory's state ten times
        inner, *_ = deepspeed.initialize(model=model, mpu=Mpu(), optimizer=optimizer, config=settings)
    inner._copy_recovery_script = lambda folder: None  # zero_to_fp32.py fails for TP > 1; weights.safetensors does it
    return Engine(config, inner, device)


def _gathered_for_writing(parameters: Sequence[torch.nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
