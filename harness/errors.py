"""The two kinds of error: a ``HarnessError`` is the user's to mend and prints without a traceback;
anything else is ours, an assertion or exception with its traceback."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command (docs/manual.md lists them for users)."""

    DONE = 0
    OTHER = 1
    CONFIG = 2
    DATA = 3
    RESOURCES = 4
    NON_FINITE = 5
    INTERRUPTED = 75


class HarnessError(Exception):
    """An error the user can mend: what is wrong, where, and what to do next."""

    exit_code = ExitCode.OTHER

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  -> {self.hint}" if self.hint else text


class ConfigError(HarnessError):
    """The run file or the command line is wrong."""

    exit_code = ExitCode.CONFIG


class DataError(HarnessError):
    """The user's rows, model directory, tokeniser or checkpoint are wrong."""

    exit_code = ExitCode.DATA


class ResourceError(HarnessError):
    """Not enough memory or disk."""

    exit_code = ExitCode.RESOURCES


class NonFiniteError(HarnessError):
    """The loss or the gradient stayed NaN or infinite."""

    exit_code = ExitCode.NON_FINITE


class Interrupted(HarnessError):
    """Stopped on request with everything saved; the same command goes on."""

    exit_code = ExitCode.INTERRUPTED
