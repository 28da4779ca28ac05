"""The learning rate of a step: warm-up, then cosine, WSD (warm-up, stable, decay) or constant.

    peak       ____cosine_             ____________wsd
              /            \\_         /                \\
    0        /               final    /                  final
"""

import math

from maha_megatron.config.schema import Schedule


def learning_rate(schedule: Schedule, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1, of a run of `total_steps`.

    The warm-up is linear and ends with `peak` at step `warmup_steps`; the decay ends with `final` at `total_steps`.
    """
    if step <= schedule.warmup_steps:
        return schedule.peak * step / schedule.warmup_steps
    if schedule.kind == "cosine":
        done_frac = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
        return schedule.final + 0.5 * (schedule.peak - schedule.final) * (1 + math.cos(math.pi * done_frac))
    if schedule.kind == "wsd":
        done_frac = (step - (total_steps - schedule.decay_steps)) / max(1, schedule.decay_steps)
        return schedule.peak + (schedule.final - schedule.peak) * min(1.0, max(0.0, done_frac))
    assert schedule.kind == "constant", schedule.kind
    return schedule.peak
