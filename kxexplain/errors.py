"""One family of errors: each says what was got, what was expected and what to do.

Every error a user can cause derives from :class:`KxError`, so ``except kx.KxError`` catches all of
them, and each also derives from the builtin that a caller would expect (``ValueError``, ``OSError`` …).

>>> from kxexplain.errors import KxError, TargetError
>>> issubclass(TargetError, KxError) and issubclass(TargetError, ValueError)
True
"""

from __future__ import annotations


class KxError(Exception):
    """Base of everything this library raises on purpose."""


class ModelError(KxError, ValueError):
    """The model cannot be recorded or explained, or is not the one the trajectory was made with."""


class DatasetError(KxError, ValueError):
    """The dataset is empty, not deterministic, or not the one the trajectory was made with."""


class TargetError(KxError, ValueError):
    """The quantity to explain does not exist for this model or these queries."""


class ArgumentError(KxError, ValueError):
    """An argument is outside what the function accepts."""


class TrainingError(KxError, RuntimeError):
    """Training cannot go on: a loss or gradient is not finite, or a step bypassed the recorder."""


class TrajectoryError(KxError, OSError):
    """A trajectory folder is missing, damaged, altered, of another format, or not writable."""


class ReplayError(KxError, RuntimeError):
    """Replaying the log did not arrive at the recorded state."""


class IndexFileError(KxError, OSError):
    """A retrieval index on disk is missing, damaged or foreign."""


class MissingExtraError(KxError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class IncompleteWarning(UserWarning):
    """A bill's remainder is more than rounding: the message says how large it is; something is wrong in the library."""


class UnattributedWarning(UserWarning):
    """A part of the bill is no example's: the message says how large it is, and the likely cause."""
