"""The exceptions that end a command, and the exit codes."""

EXIT_DONE = 0
EXIT_CRASHED = 1
EXIT_BAD_INPUT = 2
EXIT_CHECK_FAILED = 3
EXIT_STOPPED = 85
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input or recipe. The message names the file and line, or the recipe key, and the remedy.

    by_all: whether it is raised on every rank at the same place, so that all may act together before the run ends.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str = "", *, by_all: bool = False) -> None:
        super().__init__(message)
        self.by_all = by_all


class CheckFailed(Exception):
    """One of our own checks failed: step-0 parity, too many non-finite steps, conversion mismatch.

    by_all: as of `UserError`.
    """

    exit_code = EXIT_CHECK_FAILED

    def __init__(self, message: str = "", *, by_all: bool = False) -> None:
        super().__init__(message)
        self.by_all = by_all


class GeneratorLost(CheckFailed):
    """The generator of an online run cannot be used any more. The run saves its last finished step before it ends."""


class Stopped(BaseException):
    """The run stopped on request.

    It is not an error. Like KeyboardInterrupt it is a BaseException, so that no library catches it with `Exception`.

    by_all: whether it is raised on every rank at the same place.
    """

    exit_code = EXIT_STOPPED

    def __init__(self, message: str = "", *, by_all: bool = False) -> None:
        super().__init__(message)
        self.by_all = by_all
