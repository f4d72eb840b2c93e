"""Writes numbers and pictures to TensorBoard, the log and metrics.jsonl. Independent of model classes."""
