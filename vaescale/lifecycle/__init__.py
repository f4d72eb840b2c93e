"""What keeps a run alive and whole: checkpoints, its lock and status, stops, hangs. Knows no model and no loop."""
