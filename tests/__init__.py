"""Tests of maha_megatron; `bash tests/run.sh` runs them."""
