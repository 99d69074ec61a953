"""The attribution: what each training example put into a prediction."""

from kxexplain.attribution.decompose import explain
from kxexplain.attribution.result import Explanation, Ranking, Timeline

__all__ = ["Explanation", "Ranking", "Timeline", "explain"]
