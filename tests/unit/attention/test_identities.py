"""What the operator must equal in special cases, computed here by other means."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from maha_megatron.attention.normalise_rotate import normalise, rotate, rotation
from maha_megatron.attention.spec import MahaSpec
from maha_megatron.scales import first_slot, stride, visible_blocks
from tests.support.attention import FAST_BACKENDS, PACKED, Case, attend, leaves, reference, results, start_rows


def prepared(x: torch.Tensor, gain: torch.Tensor, position: torch.Tensor, spec: MahaSpec) -> torch.Tensor:
    turn = rotation(position[:, None], x.shape[-1], spec.rope_base, x.dtype)
    return rotate(normalise(x, gain, spec.norm_epsilon), *turn)


@pytest.mark.parametrize(("window", "causal"), [(90, True), (400, True), (13, False)])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_one_scale_is_causal_attention_or_a_sliding_window(backend, window, causal):
    spec = MahaSpec(ratio=4, windows=(window,), convolution=False)
    case = Case(lengths=(90,), spec=spec)
    values = leaves(case, torch.float64)
    row = torch.arange(90)
    q = prepared(values["q"], values["query_gain"], row.double(), spec)
    k = prepared(values["k"], values["key_gain"], row.double(), spec)
    age = row[:, None] - row
    mask = None if causal else (age >= 0) & (age < window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, values["v"]))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(attend(case, values, backend)["out"], expected[0].transpose(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_inert_utilities_with_lse_are_one_softmax_over_all_scales(backend):
    spec = MahaSpec(ratio=4, windows=(10, 5, 6), downsampling="mean", convolution=False)
    case = Case(lengths=(130,), spec=spec)
    values = leaves(case, torch.float64)
    for name in ("utility_query", "utility_bias"):
        values[name] = torch.zeros_like(values[name])
    row = torch.arange(130)
    logits, pooled_values = [], []
    for scale, window in enumerate(spec.windows):
        step = stride(spec.ratio, scale)
        blocks = 130 // step
        k, v = (values[name][: blocks * step].unflatten(0, (-1, step)).mean(1) for name in "kv")
        block = torch.arange(blocks)
        k = prepared(k, values["key_gain"], block + (step - 1) / step, spec).repeat_interleave(2, dim=1)
        q = prepared(values["q"], values["query_gain"], row.double() / step, spec)
        end = (row + 1) // step
        visible = (block < end[:, None]) & (block >= end[:, None] - window)
        scores = torch.einsum("tnd,mnd->ntm", q, k) / case.d**0.5
        logits.append(scores.masked_fill(~visible, -torch.inf))
        pooled_values.append(v.repeat_interleave(2, dim=1))
    joint = torch.cat(logits, dim=-1).softmax(-1)
    expected = torch.einsum("ntm,mnd->tnd", joint, torch.cat(pooled_values))
    found = attend(case, values, backend)
    torch.testing.assert_close(found["out"], expected, rtol=0, atol=1e-12)
    masses = [part.sum(-1).T for part in joint.split([x.shape[-1] for x in logits], dim=-1)]
    torch.testing.assert_close(found["weights"], torch.stack(masses, dim=-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lse_utility", [True, False])
@pytest.mark.parametrize("backend", ["naive", *FAST_BACKENDS])
def test_weights_lie_on_the_simplex_and_an_infeasible_scale_weighs_exactly_nothing(backend, lse_utility):
    case = Case(lengths=PACKED, spec=MahaSpec(ratio=4, windows=(6, 5, 12, 3), lse_utility=lse_utility))
    found = reference(case) if backend == "naive" else results(case, backend, torch.float64)
    weights = found["weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-12)
    position = torch.arange(sum(PACKED)) - start_rows(PACKED)
    for scale in range(4):
        feasible = position + 1 >= stride(4, scale)
        assert (weights[~feasible, :, scale] == 0).all()
        assert (weights[feasible, :, scale] > 0).all()
    # no document has a complete block of 64 rows: nothing reaches that scale's parameters
    for name in ("utility_query", "utility_bias", "gate_query", "gate_bias"):
        assert (found[f"grad of {name}"][-1] == 0).all()
        assert (found[f"grad of {name}"][0] != 0).any()
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("lse_utility", [True, False])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_extreme_utilities_and_logits_stay_finite(backend, lse_utility):
    case = Case(lengths=PACKED, spec=MahaSpec(ratio=4, windows=(6, 5, 12), lse_utility=lse_utility))
    values = leaves(case, torch.float32)
    values["utility_bias"] = (1e4 * values["utility_bias"].detach()).requires_grad_()
    values["query_gain"] = (100 * values["query_gain"].detach()).requires_grad_()
    found = attend(case, values, backend)
    grads = torch.autograd.grad(found["out"].sum(), list(values.values()))
    assert found["out"].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_output_depends_on_exactly_the_visible_blocks(backend):
    """The rows that influence a row's output are those that its visible blocks cover, no fewer."""
    spec = MahaSpec(ratio=3, windows=(4, 3, 2), convolution=False)
    case = Case(lengths=(20, 50), n=1, g=1, d=4, spec=spec)
    values = leaves(case, torch.float64)
    out = attend(case, values, backend)["out"]
    for row, start in enumerate(start_rows(case.lengths).tolist()):
        (grad,) = torch.autograd.grad(out[row].sum(), values["v"], retain_graph=True)
        expected = set()
        for scale, window in enumerate(spec.windows):
            step = stride(spec.ratio, scale)
            for block in visible_blocks(row - start, step, window):
                expected |= set(range(start + block * step, start + (block + 1) * step))
        assert set(grad.abs().sum((1, 2)).nonzero().flatten().tolist()) == expected


def test_angles_stay_exact_at_a_million_rows():
    position = torch.tensor([2**20 - 1.0, (2**20 - 1) / 64], dtype=torch.float64)
    exact, found = (rotation(position, 64, 10000.0, dtype) for dtype in (torch.float64, torch.float32))
    angle = position[:, None] * 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(exact[0][:, :32], angle.cos(), rtol=0, atol=1e-9)
    for one, other in zip(exact, found, strict=True):
        torch.testing.assert_close(one, other.double(), rtol=0, atol=1e-6)


def test_positions_only_matter_relative_to_each_other():
    """Rows shifted within their document give the same output while their windows see the same rows."""
    spec = MahaSpec(ratio=4, windows=(8,), convolution=False)
    case = Case(lengths=(60,), spec=spec)
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    tail = dataclasses.replace(case, lengths=(40,))
    short = attend(tail, values | {name: values[name][20:] for name in "qkv"}, "eager")["out"]
    torch.testing.assert_close(short[8:], attend(case, values, "eager")["out"][28:], rtol=0, atol=1e-12)


def test_first_slot_is_the_block_right_after_a_document_start():
    assert [first_slot(start, 4) for start in (0, 1, 4, 5)] == [0, 1, 1, 2]
