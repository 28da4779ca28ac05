"""The chunked loss against torch's cross-entropy on whole logits."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from maha_megatron.model.loss import OutputLayer
from tests.support.model import relative_difference

pytestmark = pytest.mark.usefixtures("one_rank")
ROWS, HIDDEN, VOCABULARY, PADDED = 40, 16, 90, 96


def output_layer(chunk_tokens: int, dtype: torch.dtype = torch.float32) -> OutputLayer:
    config = SimpleNamespace(hidden_size=HIDDEN, params_dtype=dtype, sequence_parallel=False)
    layer = OutputLayer(config, vocabulary=VOCABULARY, padded_vocabulary=PADDED, chunk_tokens=chunk_tokens)
    weight = torch.randn(PADDED, HIDDEN, generator=torch.Generator().manual_seed(1))
    layer.weight.data.copy_(weight)
    return layer


def inputs(dtype: torch.dtype = torch.float32, rows: int = ROWS):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, 1, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels_t = torch.randint(VOCABULARY, (rows,), generator=generator)
    mask_t = torch.rand(rows, generator=generator) > 0.3
    return hidden, labels_t, mask_t


def reference(layer: OutputLayer, hidden: torch.Tensor, labels_t: torch.Tensor, mask_t: torch.Tensor, scale: float):
    """Loss sum and the gradients of hidden and weight in fp64."""
    hidden = hidden.detach().double().requires_grad_()
    weight = layer.weight.detach().double().requires_grad_()
    logits = hidden.flatten(0, 1) @ weight[:VOCABULARY].t()
    loss = F.cross_entropy(logits[mask_t], labels_t[mask_t], reduction="sum")
    (loss * scale).backward()
    return loss, hidden.grad, weight.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 40, 1000])
def test_equals_cross_entropy_of_whole_logits(chunk_tokens, dtype, tolerance):
    layer = output_layer(chunk_tokens, dtype)
    hidden, labels_t, mask_t = inputs(dtype)
    loss = layer(hidden, labels_t, mask_t)
    (loss * 0.37).backward()
    exact_loss, hidden_gradient, weight_gradient = reference(layer, hidden, labels_t, mask_t, 0.37)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(exact_loss.item(), rel=tolerance)
    assert relative_difference(hidden.grad.double(), hidden_gradient) < tolerance
    assert relative_difference(layer.weight.grad.double(), weight_gradient) < tolerance


def test_half_precision_accumulates_the_weight_gradient_in_fp32():
    """Many chunks must not cost accuracy: bf16 sums would lose the later ones."""
    errors = {}
    for chunk_tokens in (2, 400):
        layer = output_layer(chunk_tokens, torch.bfloat16)
        hidden, labels_t, mask_t = inputs(torch.bfloat16, rows=400)
        layer(hidden, labels_t, mask_t).backward()
        _, _, exact = reference(layer, hidden, labels_t, mask_t, 1.0)
        errors[chunk_tokens] = relative_difference(layer.weight.grad.double(), exact)
    assert errors[2] < 1.2 * errors[400], errors
    assert errors[400] < 0.01, errors


def test_masked_rows_contribute_nothing():
    layer = output_layer(7)
    hidden, labels_t, mask_t = inputs()
    loss = layer(hidden, labels_t, mask_t)
    loss.backward()
    assert not hidden.grad[~mask_t].any()
    assert layer(hidden, torch.where(mask_t, labels_t, 0), mask_t) == loss
    assert layer(hidden, labels_t, torch.zeros_like(mask_t)) == 0


def test_padding_rows_get_neither_probability_nor_gradient():
    layer = output_layer(7)
    hidden, labels_t, mask_t = inputs()
    before = layer(hidden, labels_t, mask_t)
    layer.weight.data[VOCABULARY:] = 100.0
    loss = layer(hidden, labels_t, mask_t)
    loss.backward()
    assert loss == before
    assert not layer.weight.grad[VOCABULARY:].any()
    assert layer(hidden).shape == (ROWS, VOCABULARY)


def test_extreme_logits_stay_finite():
    layer = output_layer(7)
    hidden, labels_t, mask_t = inputs()
    loss = layer(hidden * 1e4, labels_t, mask_t)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor of at least 4 bytes an element had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.element_size() >= 4:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_ever_exists(dtype):
    layer = output_layer(8, dtype)
    hidden, labels_t, mask_t = inputs(dtype, rows=400)
    with LargestTensor() as ours:
        layer(hidden, labels_t, mask_t).backward()
    with LargestTensor() as whole:
        F.cross_entropy(layer(hidden), labels_t, reduction="sum").backward()
    assert ours.elements <= max(8 * PADDED, PADDED * HIDDEN, 400 * HIDDEN)
    assert whole.elements >= 400 * VOCABULARY  # the watch does see such a tensor


def test_validation_does_no_gradient_work():
    layer = output_layer(8)
    hidden, labels_t, mask_t = inputs()

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "mm" in str(function)
            return function(*args, **(kwargs or {}))

    with Products() as training:
        layer(hidden, labels_t, mask_t)
    with torch.no_grad(), Products() as validation:
        layer(hidden, labels_t, mask_t)
    assert training.count == 3 * ROWS / 8
    assert validation.count == ROWS / 8


def test_a_second_backward_is_refused():
    layer = output_layer(8)
    loss = layer(*inputs())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
