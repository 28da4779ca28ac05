"""Checkpoints of a run: their folders, manifest, writing and reading. See README.md."""
