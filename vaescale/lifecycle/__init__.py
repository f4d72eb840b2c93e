"""Fault tolerance of a run: checkpoints, lock, status, stops, hangs. Independent of the model and the training loop."""
