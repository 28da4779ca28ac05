"""From text to micro-batches; see README.md."""
