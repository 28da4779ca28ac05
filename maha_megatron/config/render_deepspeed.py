"""The one table from the configuration to DeepSpeed's dictionary. Nobody writes a DeepSpeed JSON by hand.

DeepSpeed does not check unknown top-level keys, so a test does; nothing is "auto". Every dtype is written out: left
alone, ZeRO accumulates and reduces bf16 gradients in bf16.

What accumulates the gradients of a bf16 run depends on the stage (DeepSpeed 0.19.8):
    stage 1, accumulation fp32    BF16_Optimizer: whole fp32 gradients on every rank, one all-reduce per step. It has no
                                  reduction buckets and no overlap: rules.py refuses zero.overlap here
    stage 1, accumulation bf16    the ZeRO-1 optimizer
    stage 2, 3                    the ZeRO optimizers: reduced every micro-batch, fp32 partition per rank
"""

from typing import Any

from maha_megatron.config.derive import accumulation_steps
from maha_megatron.config.schema import Config


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dictionary for deepspeed.initialize.

    Args:
        config: a configuration that passed check_topology for this world size.
        world_size: all ranks; DeepSpeed's own "world" is the data-parallel part of them.
    """
    return {
        "train_batch_size": config.train.global_batch_samples,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_samples,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.optimizer.clip_norm,
        # check_grad_overflow: a non-finite gradient leaves the weights alone (where DeepSpeed has the check: its ZeRO
        # optimizers). immediate_grad_update off: bf16 gradients of a micro-batch are added to the fp32 ones at its end
        "bf16": {
            "enabled": config.train.precision == "bf16",
            "immediate_grad_update": False,
            "check_grad_overflow": True,
        },
        "data_types": {"grad_accum_dtype": config.zero.accumulation_dtype},
        "communication_data_type": config.zero.communication_dtype,
        "zero_optimization": _zero_optimization(config),
        # plain SGD, the optimizer of the equality tests, is not on DeepSpeed's list
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _zero_optimization(config: Config) -> dict[str, Any]:
    bucket = config.zero.bucket_elements
    return {
        "stage": config.zero.stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": config.zero.overlap,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        # ZeRO-3 keeps what is smaller whole on every rank: norms, gains, convolutions and MAHA's parameters, which are
        # a few times the hidden width, and no matrix
        "stage3_param_persistence_threshold": 16 * config.model.hidden,
    }
