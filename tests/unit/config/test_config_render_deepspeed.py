"""DeepSpeed's dictionary: every key is read by DeepSpeed, which would not complain, and means what we think."""

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

from maha_megatron.config.load import config_from_dict
from maha_megatron.config.render_deepspeed import deepspeed_config


class Recording(dict):
    """A dict that notes which of its keys were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def __copy__(self):
        return self


def parse(rendered):
    """DeepSpeed's own reading of the dictionary, as one rank, and the top-level and data_types keys it looked at."""
    recorded = Recording(rendered)
    dtypes = Recording(rendered["data_types"])
    recorded["data_types"] = dtypes
    return DeepSpeedConfig(recorded), recorded.read, dtypes.read


def render(world_size=1, **sections):
    return deepspeed_config(config_from_dict(sections), world_size)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_reads_every_key(stage, precision):
    rendered = render(zero={"stage": stage}, train={"precision": precision})
    _, read, dtypes_read = parse(rendered)
    assert set(rendered) <= read
    assert set(rendered["data_types"]) <= dtypes_read


def test_an_unknown_key_would_be_noticed():
    rendered = render() | {"gradient_cliping": 1.0}
    _, read, _ = parse(rendered)
    assert "gradient_cliping" not in read


@pytest.mark.parametrize("section", ["zero_optimization", "bf16"])
def test_sections_refuse_unknown_keys_themselves(section):
    rendered = render()
    rendered[section] = rendered[section] | {"overlap_com": True}
    with pytest.raises(ValueError, match="overlap_com"):
        parse(rendered)


def test_values_arrive():
    parsed, _, _ = parse(
        render(
            train={"global_batch_samples": 24, "micro_batch_samples": 4},
            optimizer={"clip_norm": 0.5},
            zero={"stage": 2, "bucket_elements": 1000, "overlap": True, "accumulation_dtype": "bf16"},
            model={"hidden": 64},
        )
    )
    assert parsed.train_batch_size == 24
    assert parsed.train_micro_batch_size_per_gpu == 4
    assert parsed.gradient_accumulation_steps == 6
    assert parsed.gradient_clipping == 0.5
    assert parsed.bfloat16_config.enabled
    assert parsed.communication_data_type == torch.float32
    assert DtypeEnum(parsed.grad_accum_dtype).value == torch.bfloat16
    zero = parsed.zero_config
    assert (zero.stage, zero.overlap_comm, zero.reduce_scatter, zero.contiguous_gradients) == (2, True, True, True)
    assert zero.reduce_bucket_size == zero.allgather_bucket_size == zero.prefetch_bucket_size == 1000
    assert zero.param_persistence_threshold == 16 * 64
    assert parsed.steps_per_print is None
    assert not parsed.wall_clock_breakdown
    assert parsed.zero_allow_untested_optimizer


def test_bf16_runs_accumulate_and_reduce_in_fp32_unless_told_otherwise():
    parsed, _, _ = parse(render(train={"precision": "bf16"}))
    assert DtypeEnum(parsed.grad_accum_dtype).value == parsed.communication_data_type == torch.float32
    parsed, _, _ = parse(render(train={"precision": "bf16"}, zero={"communication_dtype": "bf16"}))
    assert parsed.communication_data_type == torch.bfloat16


def test_fp32_is_the_absence_of_bf16():
    assert not parse(render(train={"precision": "fp32"}))[0].bfloat16_config.enabled


def test_overlap_is_never_left_to_deepspeed():
    for stage in (1, 2, 3):
        assert parse(render(zero={"stage": stage}))[0].zero_config.overlap_comm is False


@pytest.mark.parametrize(("world_size", "tensor", "steps"), [(1, 1, 16), (8, 1, 2), (8, 4, 8), (16, 2, 2)])
def test_batch_arithmetic_is_deepspeeds(world_size, tensor, steps):
    rendered = render(world_size, train={"global_batch_samples": 16}, parallel={"tensor": tensor})
    assert rendered["gradient_accumulation_steps"] == steps
    data_parallel = world_size // tensor
    product = rendered["train_micro_batch_size_per_gpu"] * steps * data_parallel
    assert rendered["train_batch_size"] == product
