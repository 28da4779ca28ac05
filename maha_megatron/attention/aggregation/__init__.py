"""Fusion of the scales' outputs with weights on the simplex."""
