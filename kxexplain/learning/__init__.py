"""The learning: a trainer that records, comparison with SVMs, kernel machines, kernels for scikit-learn.

``rates`` has the learning rates' formulas, ``schedules`` and ``scheduler`` apply them, ``objectives`` what is minimised
beside the loss, ``bounds`` and ``diagnostics`` what theory says of a run.
"""

from kxexplain.learning.comparison import Comparison
from kxexplain.learning.svm import compare_svm
from kxexplain.learning.trainer import train

__all__ = ["Comparison", "compare_svm", "train"]
