"""Kernels before and after the queries' gradients by warp groups, in Triton's interpreter, against the naive backend.

What lies between them runs on Hopper cards alone; plain torch stands in for it.
"""

import dataclasses

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.normalise_rotate import rotate, rotation
from maha_megatron.attention.scale_attention import triton_joint, triton_scales
from maha_megatron.attention.scale_attention.triton import attend
from maha_megatron.attention.scale_attention.triton_tuning import QueryGroupTiles
from maha_megatron.attention.slots import visible_slots
from maha_megatron.attention.spec import Refinement
from maha_megatron.scales import slot_count, stride
from tests.support.attention import Case, leaves, wrong
from tests.unit.attention.test_triton import GAME, SHORT, exact, run, spec, tuning

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TUNING = dataclasses.replace(tuning(2), query_groups=QueryGroupTiles(begin_rows=16, end_rows=64))
REFINED = spec(2, (4, 3, 9), refine=Refinement(from_scale=2, to_scale=1, blocks=2))
CASES = {
    "one softmax": Case(lengths=SHORT, n=4, g=2, d=32, spec=spec()),
    "tokens": Case(lengths=SHORT, n=4, g=2, d=32, spec=spec(rope_unit="token")),
    "no LSE": Case(lengths=SHORT, n=4, g=2, d=32, spec=spec(lse_utility=False)),
    "tokens, no LSE": Case(
        lengths=(3, 50), n=2, g=1, d=32, spec=spec(3, (20, 8, 5), rope_unit="token", lse_utility=False)
    ),
    "a game": Case(lengths=(3, 50), n=2, g=1, d=32, spec=spec(3, (20, 8, 5), **GAME)),
    "tokens, gram": Case(lengths=SHORT, n=4, g=2, d=32, spec=spec(rope_unit="token", coupling="gram")),
    "refined": Case(lengths=(26, 1, 7, 40), n=2, g=1, d=32, spec=REFINED),
    "refined, tokens": Case(lengths=(47,), n=2, g=1, d=32, spec=dataclasses.replace(REFINED, rope_unit="token")),
    "one scale": Case(lengths=(70,), n=2, g=1, d=32, spec=spec(windows=(17,))),
    "mean": Case(lengths=(41,), n=2, g=1, d=32, spec=spec(aggregation="mean")),
}


class PlainMiddle:
    """In place of gluon_launch.py: what query_gradient_by_groups_kernel computes, head by head and scale by scale."""

    def __init__(self):
        self.runs = 0

    def unserved(self, rows: torch.Tensor, values: list[torch.Tensor]) -> None:
        assert rows.ndim == 3

    def launch_query_gradients(self, arguments, keys, grad_out, values, tiles, each: bool) -> "PlainMiddle":
        self.given = (arguments, keys, grad_out, values, each)
        return self

    def run(self) -> None:
        arguments, keys, grad_out, values, each = self.given
        shape, queries, places = arguments["SHAPE"], arguments["queries"], arguments["places"]
        row = torch.arange(places.rows, device=keys.device)
        self.runs += 1
        for head in range(queries.n):
            group, before, total = head // queries.n_per_group, 0, torch.zeros(places.rows, 2 * shape.half)
            for scale, past in enumerate(shape.past_slots):
                entries = past + slot_count(places.rows, stride(shape.ratio, scale))
                own = (keys[group, before : before + entries], values[scale][:, group])
                grad = grad_out[:, head * len(shape.windows) + scale if each else head]
                slots = torch.arange(-past, entries - past, device=keys.device)
                rows_stride = stride(shape.ratio, scale)
                first, end = visible_slots(row, places.document_start, rows_stride, shape.windows[scale])
                seen = (slots >= first[:, None]) & (slots < end[:, None])
                asked = self.ask(head, scale, seen, *own, grad)
                total += rotate(asked, *self.angles(row, scale, inverse=True))
                before += entries
            turned = rotate(total, *self.angles(row, len(shape.windows) - 1, inverse=False))
            arguments["found"].turned_grads[head] = turned

    def ask(self, head, scale, seen, keys, values, grad) -> torch.Tensor:
        """dq' at one scale; writes what it finds of the utility."""
        arguments, *_, each = self.given
        shape, found = arguments["SHAPE"], arguments["found"]
        turned = found.turned[head, 0 if shape.one_turn else scale]
        logits = turned @ keys.T * found.norms[head, :, None] * 1.4426950408889634 / (2 * shape.half) ** 0.5
        offset, grad_weight = found.offsets[head, scale], grad @ values.T
        weight = torch.exp2(logits + offset[:, None]).where(seen, 0)
        if shape.apart and not each:
            own = arguments["own_lse"][head, scale]
            found.delta[head, scale] = (torch.exp2(logits - own[:, None]).where(seen, 0) * grad_weight).sum(1)
        delta = found.delta[head, scale] if shape.apart else found.delta[head]
        grad_logits = weight * (grad_weight - delta[:, None])
        if shape.utilities and not each:
            share = weight.sum(1)
            found.shares[head, :, scale] = share
            found.utility_gradients[head, :, scale] = share * delta if shape.apart else grad_logits.sum(1)
        return grad_logits @ keys

    def angles(self, row, scale: int, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        shape, places = self.given[0]["SHAPE"], self.given[0]["places"]
        rows_a_step = 1 if shape.one_turn else stride(shape.ratio, scale)
        place = (row - places.document_start).double() / rows_a_step
        cos, sin = rotation(place, 2 * shape.half, 10_000.0, torch.float32)
        return cos, -sin if inverse else sin


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_by_three_kernels_equal_the_reference(case, monkeypatch):
    assert case.spec.rope_base == 10_000.0
    middle = PlainMiddle()
    monkeypatch.setattr(triton_joint, "_by_groups_if", lambda tiles: tiles and middle)

    def attention(*given):
        return attend(*given, tuning=TUNING)

    found = run(case, leaves(case, torch.float32, DEVICE), attention)
    assert middle.runs == case.g  # a portion each
    assert wrong(found, exact(case, torch.float32), 5e-6) == {}


@pytest.mark.parametrize("unit", ["block", "token"])
def test_given_gradients_of_utilities_are_taken_as_they_are(unit, monkeypatch):
    """Of outputs of every scale: all of them at once may change something, unlike where one softmax joins them."""
    given, found = randn(6, 40, 4, 3, 32, 5), []
    q, outs, grad_outs = given[0][:, :, 0], given[1], given[2]
    lses, grad_lses, grad_utilities = (x[..., 0].contiguous() for x in given[3:])
    own = spec(rope_unit=unit)
    levels = [tuple(randn(2, slot_count(40, 4**scale), 2, 32, scale)) for scale in range(3)]
    learned = (*randn(1, 4, 32, 7), *randn(1, 2, 32, 8), *randn(1, 3, 4, 32, 9), *randn(1, 3, 4, 10))
    start = torch.zeros(40, dtype=torch.int64, device=DEVICE)
    for middle in (None, PlainMiddle()):
        monkeypatch.setattr(triton_joint, "_by_groups_if", lambda tiles, middle=middle: tiles and middle)
        call = triton_scales.Call(q, *learned, start, own, (0, 0, 0), TUNING, levels)
        rows_of = triton_scales.Given(outs, lses, grad_outs, grad_lses, grad_utilities)
        grad_q, of_learned, *others = call.backward(rows_of)
        found.append([grad_q, *of_learned, *others[0], *others[1]])
    for x, expected in zip(*found, strict=True):
        torch.testing.assert_close(x, expected, rtol=2e-5, atol=2e-5)


def randn(count: int, *shape_and_seed: int) -> list[torch.Tensor]:
    *shape, seed = shape_and_seed
    numbers = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    return list(numbers.to(DEVICE))
