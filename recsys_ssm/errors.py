"""Define the exceptions for mistakes that a user can correct."""

from collections.abc import Iterable


class UserError(ValueError):
    """Mistake of a user. The message says what is wrong and where (file, column, row, option), then what to do.

    Commands print the message as one line and exit with 1. Any other exception is a defect of this package and keeps
    its traceback.
    """


class UnknownMonitorError(UserError):
    """Mistake in ``monitor``: validation has no value of this name.

    Args:
        monitor: The name.
        found: Names of the values there are.
    """

    def __init__(self, monitor: str, found: Iterable[str]) -> None:
        known = ", ".join(sorted(name for name in found if name.startswith("val/")))
        super().__init__(f"monitor={monitor}: validation has no such value; choose from {known}")
