"""The language model: megatron-core's parallel layers around MAHA or dense attention."""
