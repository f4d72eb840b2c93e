"""Shards → order → bytes → uint8. Knows no model."""


class DataError(RuntimeError):
    """The data are missing, damaged or not what the run began with; the text says what, where and what to do."""
