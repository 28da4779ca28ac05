"""Distributed pretraining of language models whose attention is MAHA."""

__version__ = "0.1.0"
