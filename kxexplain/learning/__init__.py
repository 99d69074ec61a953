"""The learning: a trainer that records, comparison with SVMs, kernel machines, kernels for scikit-learn."""

from kxexplain.learning.comparison import Comparison
from kxexplain.learning.svm import compare_svm
from kxexplain.learning.trainer import train

__all__ = ["Comparison", "compare_svm", "train"]
