"""The training loop, on one screen. What a step is lives in engine.py; what is written of it in output.py."""

import contextlib
import time

import torch.distributed as dist

from maha_megatron.checkpoint.shared_folder import check_shared
from maha_megatron.config.schema import Config
from maha_megatron.data.loader import build_loader
from maha_megatron.data.prefetch import Prefetcher
from maha_megatron.parallel import compat, groups
from maha_megatron.train.engine import build_engine
from maha_megatron.train.guards import EXIT_DONE, EXIT_INTERRUPTED, StepPlace, StopSignal, make_deterministic
from maha_megatron.train.output import RunOutput
from maha_megatron.train.program import program_on_every_rank
from maha_megatron.train.record import versions
from maha_megatron.train.schedule import learning_rate
from maha_megatron.train.state import save, start_or_resume


def train(config: Config, *, allow_program: str | None = None) -> int:
    """Train from the newest checkpoint, or from the start, to train.steps. Collective over all ranks.

    Args:
        config: a configuration that passed check_config and check_topology.
        allow_program: the module:function that maha.program may name, as the command line gave it.

    Returns:
        The process's exit code: EXIT_DONE, or EXIT_INTERRUPTED after a signal, saved.

    Raises:
        MahaError: what the user can mend.
    """
    began_s, made_with, signal = time.perf_counter(), versions(), StopSignal()
    signal.install()
    if config.train.deterministic:
        make_deterministic()
    compat.initialise_distributed(config)
    compat.initialise_model_parallel(config)
    compat.seed_everything(config.run.seed)
    program = program_on_every_rank(config, allow_program)
    ranks = {"data_parallel_rank": groups.data_rank(), "data_parallel_size": groups.data_size()}
    training_data = build_loader(config, **ranks)
    validation_data = build_loader(config, **ranks, split="validation")
    check_shared(config.run.folder)
    engine = build_engine(config, program)
    state, last = start_or_resume(engine, config, training_data.identity), config.train.steps
    step_samples = config.train.global_batch_samples
    planned_samples = state.consumed_samples + (last - state.step) * step_samples
    training_data.build_indexes(state.consumed_samples, planned_samples)  # none is built between steps
    validation_data.build_indexes(0, 0)
    feed = Prefetcher(
        training_data.step_batches,
        consumed_samples=state.consumed_samples,
        step_samples=step_samples,
        last_sample=planned_samples,
        depth=config.data.prefetch_steps,
    )
    output = RunOutput(config, state, made_with, rank=dist.get_rank(), devices=dist.get_world_size())
    with output, contextlib.closing(feed):
        output.started(engine, state, training_data.tokens_per_epoch, training_data.shares(planned_samples))
        stopping = engine.any_rank(signal.requested)
        while state.step < last and not stopping:
            step, step_began_s = state.step + 1, time.perf_counter()
            logged = due(step, config.train.log_interval_steps, last)
            numbers = training_data.sample_range(state.consumed_samples)
            result = engine.step(
                feed.take(state.consumed_samples),
                learning_rate(config.schedule, step, last),
                StepPlace(step=step, first_sample=numbers.start, samples=len(numbers)),
                with_scale_weights=logged,
            )
            step_s, validation = time.perf_counter() - step_began_s, None
            state = state.after_step(step_samples)
            if due(step, config.train.validation_interval_steps, last):
                validation = engine.evaluate(validation_data.validation_batches())
            solves = engine.take_solves() if logged or validation is not None else None
            wait_s = feed.take_wait_s()
            output.stepped(
                step, result, step_s, data_wait_s=wait_s, logged=logged, validation=validation, solves=solves
            )
            stopping = engine.any_rank(signal.requested)  # all ranks stop after the same step
            if due(step, config.checkpoint.interval_steps, last) or stopping:
                output.saved(save(engine, config, state, data=training_data.identity, versions=made_with))
        if state.step < last:
            output.interrupted(state)
            return EXIT_INTERRUPTED
        output.finished(state, time.perf_counter() - began_s, training_data.shares(state.consumed_samples))
    return EXIT_DONE


def due(step: int, interval_steps: int, last_step: int) -> bool:
    """Whether something with this interval happens after `step`: at its multiples, and at the end; 0: only then."""
    return step == last_step or (interval_steps > 0 and step % interval_steps == 0)
