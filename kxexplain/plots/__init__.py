"""The pictures: an explanation, its neighbours, the comparisons with a support vector machine and with retraining.

Every function gives a :class:`matplotlib.figure.Figure` of its own, made without pyplot: no window opens, and no
setting of the caller's changes. Save it with ``figure.savefig(path)``. Blue pushed a prediction up, orange-red down.
"""

from kxexplain.plots.comparison import plot_comparison
from kxexplain.plots.explanation import plot_explanation
from kxexplain.plots.neighbors import plot_neighbors
from kxexplain.plots.updates import plot_updates

__all__ = ["plot_comparison", "plot_explanation", "plot_neighbors", "plot_updates"]
