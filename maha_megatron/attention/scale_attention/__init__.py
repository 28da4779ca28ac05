"""Attention of full-rate queries to the visible blocks of each scale."""
