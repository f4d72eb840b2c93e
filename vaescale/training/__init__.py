"""The training loop and the training step. Only `engine` imports deepspeed."""
