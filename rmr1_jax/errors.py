"""The one exception for what a user gave: what was given, where, what was expected, what to do.

The command line prints it without a traceback and exits with 2. Anything else that escapes is a defect of ours.
"""


class InputError(ValueError):
    """Bad input. The message says what was given, where (file, line, field), what was expected, and the remedy."""


class RunError(RuntimeError):
    """A run cannot go on for a reason that is neither its input nor a defect: a loss that is no longer finite, say."""
