"""Signals become requests; a number that is not finite stops the run and names the batch."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from maha_megatron.errors import TrainingError
from maha_megatron.train.guards import StepPlace, StopSignal, check_finite, make_deterministic


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    stop = StopSignal()
    stop.install()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested


@pytest.mark.usefixtures("handlers")
def test_sigterm_may_come_twice_but_a_second_sigint_interrupts() -> None:
    stop = StopSignal()
    stop.install()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_names_step_and_samples(value: float) -> None:
    with pytest.raises(TrainingError, match=r"loss of step 7 is -?(nan|inf).*samples 48 to 55"):
        check_finite(value, "loss", StepPlace(step=7, first_sample=48, samples=8))


def test_finite_passes() -> None:
    check_finite(1e30, "loss", StepPlace(step=7, first_sample=48, samples=8))


def test_deterministic_kernels_are_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(before)
