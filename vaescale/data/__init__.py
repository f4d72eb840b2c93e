"""Shards → order → bytes → uint8. Knows no model."""

from ..files import printable


class DataError(RuntimeError):
    """The data are missing, damaged or not what the run began with; the text says what, where and what to do.

    It may quote names from the data of others: it is made printable here.
    """

    exit_code = 2

    def __init__(self, text: str) -> None:
        # An error in a loader's worker arrives with the worker's traceback around it, which ends in the sentence.
        super().__init__(printable(text.rpartition(f"\n{__name__}.DataError: ")[2].strip()))
