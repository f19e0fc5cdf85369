"""The one family of errors that LoongForge raises for things a user can mend.

Each class fixes the exit code of the command line, so that a scheduler can tell a typing error from a full disk.
Programmer mistakes stay ordinary `assert`s with a message.
"""

from __future__ import annotations


class ForgeError(Exception):
    """Base of every error with a remedy: `problems` holds each that was found, `exit_code` is the command line's."""

    exit_code = 1

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ConfigError(ForgeError):
    """A configuration value, key, flag or file is wrong."""

    exit_code = 2


class PlanError(ForgeError):
    """The layout is illegal or does not fit; raised before any device is touched."""

    exit_code = 3


class DataError(ForgeError):
    """A data file is absent, corrupt or does not hold what its format promises."""

    exit_code = 4


class CheckpointError(ForgeError):
    """A checkpoint is absent, incomplete, corrupt or does not match the model."""

    exit_code = 5


class PluginError(ForgeError):
    """A registered plugin cannot be used; the message says whose it is and what to do."""

    exit_code = 6


class PlatformError(ForgeError):
    """The requested device platform is not available here."""

    exit_code = 7


class TrainingError(ForgeError):
    """Training cannot go on, for example because the loss is not finite."""

    exit_code = 8


PREEMPTED_EXIT_CODE = 75
"""Exit code after SIGTERM once the state is saved (EX_TEMPFAIL: run the same command again)."""
