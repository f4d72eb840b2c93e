"""Numbers and pictures → TensorBoard, one log line, JSONL. Knows no model class."""
