"""Batches prepared ahead by a background thread, and how long training had to wait for them."""

import queue
import threading
import time
from collections.abc import Callable

import torch

from maha_megatron.data.batch import MicroBatch

StepBatches = list[MicroBatch]
CLOSE_INTERVAL_S = 0.1


class Prefetcher:
    """The batches of one step after another, from a sample on.

    Args:
        step_batches: Gives the batches of the step that starts after so many consumed samples (Loader.step_batches).
        consumed_samples: Where the first step starts.
        step_samples: By how many samples a step advances.
        last_sample: No step is prepared that starts here or later.
        depth: Steps prepared ahead; 0: no thread, each step is prepared when it is asked for.
    """

    def __init__(
        self,
        step_batches: Callable[[int], StepBatches],
        *,
        consumed_samples: int,
        step_samples: int,
        last_sample: int,
        depth: int,
    ):
        self._prepare, self._step_samples, self._last = step_batches, step_samples, last_sample
        self._next, self._waited_s = consumed_samples, 0.0
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._closed = threading.Event()
        self._ready: queue.Queue[StepBatches | BaseException] = queue.Queue(maxsize=max(depth, 1))
        self._thread = None
        if depth:
            self._thread = threading.Thread(target=self._run, args=(consumed_samples,), daemon=True, name="prefetch")
            self._thread.start()

    def take(self, consumed_samples: int) -> StepBatches:
        """The batches of the next step.

        Args:
            consumed_samples: Where it starts; steps are taken in order.

        Raises:
            DataError: As step_batches, whose errors come out here.
        """
        assert consumed_samples == self._next, (consumed_samples, self._next)
        began_s = time.perf_counter()
        found = self._ready.get() if self._thread else self._prepared(consumed_samples)
        self._waited_s += time.perf_counter() - began_s
        if isinstance(found, BaseException):
            raise found
        self._next += self._step_samples
        return found

    def take_wait_s(self) -> float:
        """Seconds that `take` made its caller wait since this was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def close(self) -> None:
        """End the thread; what it prepared is dropped."""
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _run(self, consumed_samples: int) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # of this thread: else its pinned memory would be another GPU's
        while consumed_samples < self._last and not self._closed.is_set():
            try:
                found: StepBatches | BaseException = self._prepared(consumed_samples)
            except Exception as error:  # told to the one who asks for this step
                found = error
            self._put(found)
            if isinstance(found, BaseException):
                return
            consumed_samples += self._step_samples

    def _put(self, found: StepBatches | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(found, timeout=CLOSE_INTERVAL_S)
            except queue.Full:
                continue
            return

    def _prepared(self, consumed_samples: int) -> StepBatches:
        batches = self._prepare(consumed_samples)
        return batches if self._device is None else [batch.pinned() for batch in batches]
