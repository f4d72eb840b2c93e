"""Shards → order → bytes → uint8. Knows no model."""


class DataError(RuntimeError):
    """The data are missing, damaged or not what the run began with; the text says what, where and what to do."""

    exit_code = 2

    def __str__(self) -> str:
        # From a loader's worker it comes with that worker's traceback around it; the last line is the sentence.
        return super().__str__().strip().splitlines()[-1].removeprefix("vaescale.data.DataError: ")
