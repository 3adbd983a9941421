"""The ways a command may end, and their exit codes."""

EXIT_DONE = 0
EXIT_CRASHED = 1
EXIT_BAD_INPUT = 2
EXIT_CHECK_FAILED = 3
EXIT_STOPPED = 85
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input or recipe. The message names the file and line, or the recipe key, and the remedy."""

    exit_code = EXIT_BAD_INPUT


class CheckFailed(Exception):
    """A check of our own refused to go on: step-0 parity, non-finite steps, conversion mismatch."""

    exit_code = EXIT_CHECK_FAILED


class Stopped(BaseException):
    """The run was asked to stop, and did. Like KeyboardInterrupt it is no error, and no library may swallow it.

    by_all: raised on every rank, at the same place.
    """

    exit_code = EXIT_STOPPED

    def __init__(self, message: str = "", *, by_all: bool = False) -> None:
        super().__init__(message)
        self.by_all = by_all
