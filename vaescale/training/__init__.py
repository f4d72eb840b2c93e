"""The trainer and what it stands on. `engine` is the only importer of deepspeed."""
