"""Attention of queries, at full rate or pooled with their scale, to the visible blocks of each scale."""
