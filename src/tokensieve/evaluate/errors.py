"""What can go wrong with a user's data and output folder; each message is one line for people."""


class DataError(ValueError):
    """The data cannot be used: says where and why."""


class OutputError(OSError):
    """A result cannot be written: says why, and what is kept."""


class ResumeError(ValueError):
    """The output folder holds the predictions of another set-up."""
