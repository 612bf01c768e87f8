"""Errors whose message is meant for the person at the keyboard: the command line prints them without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right; the message says what came, what was expected and what to do."""


class ConfigError(UserError, ValueError):
    """A setting is out of range, or contradicts another one."""


class DataError(UserError, ValueError):
    """A data set is missing, empty, of the wrong kind or unreadable."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or run directory cannot be read, written, or does not fit the model."""


class TeacherError(UserError, RuntimeError):
    """A pretrained teacher cannot be loaded or run, or its precomputed features do not fit."""


class ProcessLost(UserError, RuntimeError):
    """Another process of a run ended, or does not answer."""


class TrainingDiverged(UserError, ArithmeticError):
    """The loss or the weights stopped being finite."""


def first_line(error: Exception) -> str:
    """What an error of somebody else's code says, in a line without a full stop; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
