"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A user's mistake: what was wrong, where (file, column, row, option) and what to do.

    The doors (``recsys_ssm.train``, ``recsys_ssm.evaluate``) print it as one line and exit with 1;
    anything else that is raised is a defect of ours and keeps its traceback.
    """
