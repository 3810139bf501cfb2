"""The exceptions for mistakes a user can mend."""

from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake: what was wrong, where (file, column, row, option) and what to do.

    The doors (``recsys_ssm.train``, ``recsys_ssm.evaluate``) print it as one line and exit with 1;
    anything else that is raised is a defect of ours and keeps its traceback.
    """


class UnknownMonitorError(UserError):
    """``monitor`` names what no validation found; ``found`` are the metrics it did."""

    def __init__(self, monitor: str, found: Iterable[str]) -> None:
        known = ", ".join(sorted(name for name in found if name.startswith("val/")))
        super().__init__(f"monitor={monitor}: validation found no such value; it found {known}")
