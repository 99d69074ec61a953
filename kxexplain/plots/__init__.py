"""The pictures: an explanation, its neighbours, comparisons with an SVM and with retraining, a run and its bounds.

Every function gives a :class:`matplotlib.figure.Figure` of its own, made without pyplot: no window opens, and no
setting of the caller's changes. Save it with ``figure.savefig(path)``. Blue pushed a prediction up, orange-red down.
"""

from kxexplain.plots.bounds import plot_bounds
from kxexplain.plots.comparison import plot_comparison
from kxexplain.plots.explanation import plot_explanation
from kxexplain.plots.neighbors import plot_neighbors
from kxexplain.plots.training import plot_training
from kxexplain.plots.updates import plot_updates

__all__ = ["plot_bounds", "plot_comparison", "plot_explanation", "plot_neighbors", "plot_training", "plot_updates"]
