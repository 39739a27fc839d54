"""The run folder: configuration, checkpoints, metrics, and what a run begins from."""
