"""scikit-learn's checks of what an estimator is given, with errors of this library's family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from kxexplain.errors import DatasetError


@contextmanager
def dataset_errors() -> Iterator[None]:
    """Make scikit-learn's ``ValueError`` a ``DatasetError``, in its words."""
    try:
        yield
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(str(error)) from error


def validated(estimator: BaseEstimator, *given: Any, reset: bool) -> Any:
    """Rows (and targets) as scikit-learn checks them; float32 stays, all else becomes float64.

    Raises:
        DatasetError: NaN, too few rows, another number of features, what else scikit-learn refuses.

    >>> validated(BaseEstimator(), [[1, 2]], reset=True)
    array([[1., 2.]])
    """
    with dataset_errors():
        return validate_data(estimator, *given, reset=reset, dtype=[np.float64, np.float32], order="C")


__all__ = ["dataset_errors", "validated"]
