"""The loop and one step of it. `engine` is the only importer of deepspeed."""
