"""Process groups, and what megatron-core and DeepSpeed need to work together on any device."""
