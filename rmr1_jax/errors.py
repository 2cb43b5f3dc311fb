"""The two exceptions of the package, and the exit codes of its commands.

The command line prints either exception without a traceback. Any other exception that escapes is a bug.
"""


class InputError(ValueError):
    """Bad input. The message says what was given, where (file, line, field), what was expected, and the remedy."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that is neither its input nor a bug: a loss that is not finite, a full disk."""


def exit_code(error: BaseException) -> int:
    """Return the exit code for an exception: 2 for InputError, 130 for Ctrl-C, that of a SystemExit, else 1."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1
