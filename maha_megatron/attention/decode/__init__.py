"""Short pieces of many streams at once: decoding against the state."""
