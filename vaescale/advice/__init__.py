"""Analyses a run without training it: dry run, cost plan, checks before the start, and diagnosis afterwards."""
