"""Errors meant for the person at the keyboard: what was found, what was expected, what to do.

The command line prints their message alone and exits with 1 (or 2 for `UsageError`). Anything else
that escapes is a defect of this project and keeps its traceback.
"""

from typing import Self


class UserError(ValueError):
    """Something outside the program is wrong and the person can fix it.

    Attributes:
        shared: whether all processes of a training raise it together, so that one of them prints it for all.
        resumable: whether the same command goes on once its cause is gone: work had begun, and is kept.
    """

    shared = False
    resumable = False

    def on_all(self) -> Self:
        """Mark it as raised by all processes together, with the same text."""
        self.shared = True
        return self


class UsageError(UserError):
    """A command, a setting or an argument does not make sense; exit status 2."""


class RecipeError(UsageError):
    """A recipe has an unknown key, a wrong type or an impossible value."""


class DataError(UserError):
    """A data set, split, shard or label is missing or malformed."""


class MissingDataError(DataError):
    """A data set's files are not there."""


class RunError(UserError):
    """A run directory is foreign, in use, stale, or would be overwritten."""


class CheckpointError(UserError):
    """A checkpoint or a network file is missing, cut short, edited, or of another shape."""


class TargetsError(UserError):
    """A store of distributions is incomplete, or belongs to another teacher or class list."""


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite; the update was not applied, by any process."""

    shared = True


class FeedbackError(UserError):
    """The gradient of the labelled loss in the targets cannot be computed at this step."""


class RanksError(UserError):
    """Processes that train together cannot reach each other, or one of them does not come."""
