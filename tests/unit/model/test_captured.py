"""What keeps layers from being captured is said before training."""

import pytest
import torch

from maha_megatron.errors import EnvironmentMismatch
from maha_megatron.model import captured
from tests.support.model import random_model, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")


def test_without_a_device_there_are_no_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentMismatch, match="finds no CUDA device; set"):
        captured.capture_attention(random_model(tiny_config()), 64)


def test_what_cannot_be_captured_is_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(captured, "_capture_in_order", fail)
    with pytest.raises(EnvironmentMismatch, match=r"be captured \(operation not permitted when .* is capturing\); set"):
        captured.capture_attention(random_model(tiny_config()), 64)
