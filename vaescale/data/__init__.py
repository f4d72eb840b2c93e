"""From shards to batches: shards → order → bytes → uint8. Nothing here depends on a model."""

from ..files import printable


class DataError(RuntimeError):
    """The data are missing, damaged or not those the run began with. The text says what, where and what to do.

    The text may quote names from untrusted data, so the constructor makes it printable.
    """

    exit_code = 2

    def __init__(self, text: str) -> None:
        # An error from a loader's worker arrives as the worker's traceback, whose end is the sentence.
        super().__init__(printable(text.rpartition(f"\n{__name__}.DataError: ")[2].strip()))
