"""Causal dilated depthwise convolution on the query, key and value channels."""
