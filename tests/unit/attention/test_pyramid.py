"""The pyramid: every downsampling, with and without a key map, against its definition, and what each must be alone."""

import dataclasses
import itertools

import pytest
import torch

from maha_megatron.attention import row_blocks
from maha_megatron.attention.dispatch import backend as backend_named
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from tests.support.attention import (
    FAST_BACKENDS,
    PACKED,
    Case,
    assert_close,
    assert_within_twice_of_plain,
    attend,
    leaves,
    parameter_specs,
    reference,
    results,
    start_rows,
)
from tests.support.everyday import everyday

DOWNSAMPLINGS = ("gated", "conv", "mean", "max")
OPTIONS = {
    f"{downsampling}{', key map' if key_map else ''}": {"downsampling": downsampling, "key_map": key_map}
    for downsampling, key_map in itertools.product(DOWNSAMPLINGS, (False, True))
}
BACKENDS = ("naive", *FAST_BACKENDS)
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
backends = pytest.mark.parametrize("backend", BACKENDS)
fast_backends = pytest.mark.parametrize("backend", FAST_BACKENDS)


def documents_around(ratio: int) -> tuple[int, ...]:
    """Lengths just below, at and above a block of the first two coarse scales; the sum is odd where it can be."""
    return (2 * ratio**2 + 1, 1, ratio - 1, ratio, ratio + 1, ratio**2 - 1)


SHAPES = {
    **{f"{rows} rows": ((rows,), 4, (6, 5, 3)) for rows in (1, 3, 4, 5)},
    **{f"ratio {ratio}": (documents_around(ratio), ratio, (9, 8, 2)) for ratio in range(2, 9)},
    "eight scales": ((3, 131, 1), 2, (3, 2, 2, 2, 2, 2, 2, 2)),
    "packed": (PACKED, 4, (24, 9, 6)),
}


def case_of(shape: str, **options) -> Case:
    lengths, ratio, windows = SHAPES[shape]
    return Case(lengths=lengths, n=4, g=2, d=8, spec=MahaSpec(ratio=ratio, windows=windows, **options))


# ------------------------------------------------------------------------------------------------ against the reference


MANY_SHAPES, EVERY_SHAPE = ("1 rows", "5 rows", "ratio 2", "ratio 4", "packed"), ("gated", "conv, key map")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@fast_backends
@pytest.mark.parametrize(
    ("shape", "name"),
    everyday(itertools.product(SHAPES, OPTIONS), lambda shape, name: shape in MANY_SHAPES or name in EVERY_SHAPE),
)
def test_forward_and_every_gradient_equal_the_reference(shape, name, backend, dtype, tolerance):
    case = case_of(shape, **OPTIONS[name])
    found, expected = results(case, backend, dtype), reference(case)
    if shape == "1 rows" and dtype == torch.float32:
        # one row sees one key: nothing reaches its logits but, in fp32, rounding that a reference of 0 gives no scale
        expected = {name: value for name, value in expected.items() if value.abs().max() > 1e-12}
        assert "grad of v" in expected
        found = {name: found[name] for name in expected}
    assert_close(found, expected, tolerance)


@options
def test_eager_in_many_blocks_equals_the_reference(monkeypatch, options):
    monkeypatch.setitem(row_blocks._BLOCK_ELEMENTS, "cpu", 200)
    case = case_of("packed", **options)
    assert_close(results(case, "eager", torch.float64), reference(case), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "name"),
    everyday(
        itertools.product((torch.float32, torch.bfloat16), OPTIONS),
        lambda dtype, name: name in EVERY_SHAPE or (dtype == torch.bfloat16 and "key map" not in name),
    ),
    ids=str,
)
@fast_backends
def test_at_most_twice_as_far_from_exact_as_plain_torch_in_the_dtype(dtype, name, backend):
    """Without a convolution: rounding its result makes and breaks ties, and max has a kink there."""
    assert_within_twice_of_plain(case_of("packed", convolution=False, **OPTIONS[name]), backend, dtype)


@pytest.mark.gpu
@fast_backends
@options
def test_on_a_gpu(options, backend):
    case = case_of("packed", convolution=False, **options)
    assert_close(results(case, backend, torch.float64, "cuda"), reference(case), 1e-10)
    for dtype in (torch.float32, torch.bfloat16):
        assert_within_twice_of_plain(case, backend, dtype, "cuda")


@fast_backends
@options
def test_gradcheck(options, backend):
    case = Case(lengths=(7, 5), n=2, g=1, d=4, spec=MahaSpec(ratio=2, windows=(3, 2, 2), **options))
    values = leaves(case, torch.float64)

    def out(*tensors):
        return attend(case, dict(zip(values, tensors, strict=True)), backend)["out"]

    assert torch.autograd.gradcheck(out, list(values.values()), fast_mode=True)


@fast_backends
@options
def test_two_runs_are_bitwise_equal(options, backend):
    first, second = (results(case_of("packed", **options), backend, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------------------------------------- level by level


def levels_of(case: Case, values: dict[str, torch.Tensor], backend: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Keys and values of scale 0 as a leaf [t, 2, g, d], and the levels built on them, [slots, 2, g, d]."""
    kv = torch.stack((values["k"], values["v"]), 1).detach().requires_grad_()
    learned = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    levels = backend_named(backend).build_pyramid(kv.unbind(1), start_rows(case.lengths), learned, case.spec)
    return kv, [torch.stack(level, dim=1) for level in levels]


@fast_backends
@options
def test_every_level_equals_the_reference_and_unused_slots_are_zero(backend, options):
    case = Case(lengths=PACKED, spec=MahaSpec(ratio=4, windows=(9, 9, 9, 9), **options))
    values = leaves(case, torch.float64)
    _, found = levels_of(case, values, backend)
    _, expected = levels_of(case, values, "naive")
    unused = [(level == 0).flatten(1).all(1) for level in expected]
    assert unused[2].any(), "a slot without a complete block is among the cases"
    for level, reference_level, zero in zip(found, expected, unused, strict=True):
        torch.testing.assert_close(level, reference_level, rtol=0, atol=1e-11)
        assert (level[zero] == 0).all()


@fast_backends
@options
def test_what_lies_in_no_complete_block_gets_exactly_no_gradient(backend, options):
    """Even where a gradient stands at a slot that holds no block."""
    case = Case(lengths=(9, 3, 6, 1), spec=MahaSpec(ratio=4, windows=(9, 9), **options))
    values = leaves(case, torch.float64)
    kv, levels = levels_of(case, values, backend)
    learned = {name: values[name] for name in ("gate_query", "gate_bias", "pool_kernel", "key_map") if name in values}
    in_blocks = torch.tensor([*[True] * 8, False, *[False] * 3, *[True] * 4, False, False, False])
    direction = torch.randn(levels[1].shape, generator=torch.Generator().manual_seed(3)).double()
    grads = torch.autograd.grad(levels[1], [kv, *learned.values()], direction, retain_graph=True)
    assert (grads[0][~in_blocks] == 0).all()
    assert (grads[0][in_blocks].flatten(1) != 0).any(1).any()
    unused = (levels[1] == 0).flatten(1).all(1)
    assert unused.sum() == 2  # of the documents of 3 rows and of 1
    only_unused = torch.where(unused[:, None, None, None], direction, 0)
    for grad in torch.autograd.grad(levels[1], [kv, *learned.values()], only_unused):
        assert (grad == 0).all()


@options
def test_eager_keeps_its_levels_and_under_a_key_map_the_pooled_keys(options):
    rows, g, d = 2048, 2, 32
    case = Case(lengths=(rows,), n=g, g=g, d=d, spec=MahaSpec(ratio=4, windows=(128, 112, 128), **options))
    kept = set()

    def pack(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().nbytes() > 2**14:  # learned tensors are smaller
            kept.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes() // 4))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, levels = levels_of(case, leaves(case, torch.float32), "eager")
    pooled = [rows // 4**scale for scale in range(3)]
    # the coarsest level is not pooled again; pooled keys lie beside their values, which attention keeps
    under_map = options["key_map"] * (sum(pooled[1:]) + pooled[-1])
    assert sum(size for _, size in kept) == g * d * (2 * sum(pooled[:-1]) + under_map)
    assert len(levels) == 3


@backends
def test_a_coarser_scale_pools_mapped_keys(backend):
    case = Case(
        lengths=(8,), n=1, g=1, d=4, spec=MahaSpec(ratio=2, windows=(4, 2, 1), key_map=True, downsampling="mean")
    )
    values = leaves(case, torch.float64)
    _, levels = levels_of(case, values, backend)
    first, second = values["key_map"][:, 0]
    keys, means = values["k"][:, 0], values["v"][:, 0].unflatten(0, (2, 4)).mean(1)
    fine = torch.stack([first @ (keys[2 * block] + keys[2 * block + 1]) / 2 for block in range(4)])
    coarse = torch.stack([second @ (fine[2 * block] + fine[2 * block + 1]) / 2 for block in range(2)])
    torch.testing.assert_close(levels[1][:, 0, 0], fine, rtol=0, atol=1e-13)
    torch.testing.assert_close(levels[2][:, 0, 0], coarse, rtol=0, atol=1e-13)
    torch.testing.assert_close(levels[2][:, 1, 0], means, rtol=0, atol=1e-13)  # values are not mapped


@backends
def test_a_kernel_weighs_each_child_by_channel_and_by_key_or_value(backend):
    case = Case(lengths=(9,), n=2, g=2, d=4, spec=MahaSpec(ratio=3, windows=(4, 3), downsampling="conv"))
    values = leaves(case, torch.float64)
    _, levels = levels_of(case, values, backend)
    for block, side, group, channel in itertools.product(range(3), range(2), range(2), range(4)):
        children = values["kv"[side]][3 * block : 3 * block + 3, group, channel]
        expected = sum(values["pool_kernel"][0, side, group, channel, child] * children[child] for child in range(3))
        assert abs(levels[1][block, side, group, channel] - expected) <= 1e-13


# --------------------------------------------------------------------------------------------------------------- max


@backends
def test_a_tie_of_max_gives_its_whole_gradient_to_the_first_child(backend):
    case = Case(lengths=(8,), n=1, g=1, d=2, spec=MahaSpec(ratio=4, windows=(4, 2), downsampling="max"))
    rows = torch.tensor([[2.0, 0], [3, 0], [3, 0], [1, 0], [-5, 1], [-5, 2], [-7, 2], [-5, 2]], dtype=torch.float64)
    values = leaves(case, torch.float64) | {"k": rows[:, None], "v": -rows[:, None]}
    kv, levels = levels_of(case, values, backend)
    assert levels[1][:, 0, 0].tolist() == [[3, 0], [-5, 2]]
    assert levels[1][:, 1, 0].tolist() == [[-1, 0], [7, -1]]
    direction = torch.tensor([[10.0, 20], [30, 40]], dtype=torch.float64)[:, None, None].expand(2, 2, 1, 2)
    (grad,) = torch.autograd.grad(levels[1], kv, direction)
    assert grad[:, 0, 0].tolist() == [[0, 20], [10, 0], [0, 0], [0, 0], [30, 0], [0, 40], [0, 0], [0, 0]]
    assert grad[:, 1, 0].tolist() == [[0, 20], [0, 0], [0, 0], [10, 0], [0, 40], [0, 0], [30, 0], [0, 0]]


@fast_backends
def test_with_many_ties_max_equals_the_reference(backend):
    """Integers from -2 to 2: almost every block has ties, at every scale."""
    case = case_of("ratio 3", downsampling="max", convolution=False)
    found, expected = (_of_integers(case, name) for name in (backend, "naive"))
    assert_close(found, expected, 1e-10)


def _of_integers(case: Case, backend: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    values = leaves(case, torch.float64)
    for name in "kv":
        integers = torch.randint(-2, 3, values[name].shape, generator=generator)
        values[name] = integers.double().requires_grad_()
    out = attend(case, values, backend)["out"]
    direction = torch.randn(out.shape, generator=generator).double()
    grads = torch.autograd.grad(out, list(values.values()), direction)
    return {"out": out.detach()} | dict(zip(values, grads, strict=True))


# ------------------------------------------------------------------------------------------------------------- starts


def at_start(case: Case, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random leaves, but for the learned tensor called `name`, which is as it starts."""
    return leaves(case, dtype) | {name: parameter_specs(case)[name].initial().to(dtype)}


@backends
@pytest.mark.parametrize("ratio", range(2, 9))
def test_a_kernel_starts_as_the_mean(backend, ratio):
    case = case_of(f"ratio {ratio}", downsampling="conv")
    kernel = at_start(case, "pool_kernel", torch.float32)
    mean = dataclasses.replace(case, spec=dataclasses.replace(case.spec, downsampling="mean"))
    _, found = levels_of(case, kernel, backend)
    _, expected = levels_of(mean, kernel, backend)
    for level, of_mean in zip(found, expected, strict=True):
        torch.testing.assert_close(level, of_mean, rtol=0, atol=0 if backend != "naive" else 1e-6)


@backends
@pytest.mark.parametrize("downsampling", ["gated", "conv"])
def test_a_learned_downsampling_starts_as_the_mean_in_the_whole_operator(backend, downsampling):
    case = case_of("packed", downsampling=downsampling)
    values = leaves(case, torch.float64)
    for name in ("gate_query", "gate_bias", "pool_kernel"):
        if name in values:
            values[name] = parameter_specs(case)[name].initial().double()
    mean = dataclasses.replace(case, spec=dataclasses.replace(case.spec, downsampling="mean"))
    found, expected = attend(case, values, backend)["out"], attend(mean, values, backend)["out"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@backends
@pytest.mark.parametrize("downsampling", DOWNSAMPLINGS)
def test_a_key_map_starts_without_effect(backend, downsampling):
    case = case_of("packed", downsampling=downsampling, key_map=True)
    without = dataclasses.replace(case, spec=dataclasses.replace(case.spec, key_map=False))
    values = at_start(case, "key_map", torch.float64)
    found, expected = attend(case, values, backend)["out"], attend(without, values, backend)["out"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
