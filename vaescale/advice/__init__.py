"""What is said of a run without training it: dry run, plan, checks before it and reading its remains."""
