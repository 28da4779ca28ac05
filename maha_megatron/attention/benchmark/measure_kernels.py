"""One row of the GPU benchmark: every subject of a case at one length, timed in turns, then weighed."""

from dataclasses import asdict

from maha_megatron.attention.benchmark.cases import Case
from maha_megatron.attention.benchmark.kernel_figures import KernelRow, medians
from maha_megatron.attention.benchmark.subjects import DTYPES, draw_inputs
from maha_megatron.attention.benchmark.turns import Clock, start, take_turns
from maha_megatron.attention.benchmark.work import Card, work_of

RawTimes = dict[str, list[dict[str, float]]]


def measured(
    case: Case, length: int, dtype: str, clock: Clock, card: Card | None, *, turns: int, limit_s: float
) -> tuple[KernelRow, RawTimes]:
    """The row, and every single time.

    Args:
        card: rates of the device, for the floor; None where none were taken.
        turns, limit_s: as `take_turns` takes them.

    Raises:
        MahaError: the case's reference did not run.
    """
    inputs = draw_inputs(case.setting, length, DTYPES[dtype])
    ready, unavailable = start(case.subjects, case.setting, inputs, clock, case.reference)
    times = take_turns(ready, clock, turns=turns, limit_s=limit_s)
    weighed = {name: clock.memory(run) for name, run in ready.items()}
    row = KernelRow(
        case=case.name,
        setting=case.setting,
        dtype=dtype,
        length=length,
        median_s=medians(times),
        memory={name: memory for name, memory in weighed.items() if memory is not None},
        unavailable=unavailable,
        work=None if card is None else work_of(case.setting, length, DTYPES[dtype].itemsize, card),
    )
    return row, {name: [asdict(one) for one in taken] for name, taken in times.items()}
