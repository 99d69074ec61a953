"""The search: training examples that mattered for a prediction, and those nearest to it, found with FAISS."""

from kxexplain.search.index import GradientIndex
from kxexplain.search.neighbors import Hits, Neighbors
from kxexplain.search.self_influence import self_influence
from kxexplain.search.tuning import dim_for_recall

__all__ = ["GradientIndex", "Hits", "Neighbors", "dim_for_recall", "self_influence"]
