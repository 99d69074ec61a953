"""Learning new examples as kernel terms, without retraining."""

from kxexplain.learning.incremental.merging import Merged
from kxexplain.learning.incremental.model import IncrementalModel

__all__ = ["IncrementalModel", "Merged"]
