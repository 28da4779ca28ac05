"""Programs over the scales, for maha.aggregation: program. Copy one and change it."""
