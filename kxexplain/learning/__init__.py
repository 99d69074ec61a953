"""The learning: a trainer that records, and the comparison with an SVM on the network's own kernel."""

from kxexplain.learning.comparison import Comparison
from kxexplain.learning.svm import compare_svm
from kxexplain.learning.trainer import train

__all__ = ["Comparison", "compare_svm", "train"]
