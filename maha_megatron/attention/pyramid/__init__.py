"""Summaries of the keys and values: block b of scale l pools r blocks of scale l-1."""
