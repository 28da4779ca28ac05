"""Training: the loop, the engine under it, schedules, metrics and guards. See README.md."""
