"""The search: training examples that mattered for a prediction, and those nearest to it, found with FAISS."""

from kxexplain.search.index import GradientIndex
from kxexplain.search.neighbors import Hits, Neighbors

__all__ = ["GradientIndex", "Hits", "Neighbors"]
