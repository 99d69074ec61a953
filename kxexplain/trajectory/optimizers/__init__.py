"""How each optimiser's step divides among the examples: a formula a file, a line in the table.

To add one: write a function that gives its :class:`Recursion` (the formula beside it), and a line in
:data:`RECURSIONS`. The tests' table of optimisers then holds it to completeness and to a forward propagation of every
example's share.
"""

from kxexplain.trajectory.optimizers.adam import adam, adamw
from kxexplain.trajectory.optimizers.adaptive import adagrad, rmsprop
from kxexplain.trajectory.optimizers.recursion import STILL, Coefficient, Itemised, Recursion, Values
from kxexplain.trajectory.optimizers.sgd import sgd

RECURSIONS = {
    "SGD": Itemised(sgd, "momentum_buffer"),
    "Adam": Itemised(adam, "exp_avg"),
    "AdamW": Itemised(adamw, "exp_avg"),
    "Adagrad": Itemised(adagrad),
    "RMSprop": Itemised(rmsprop, "momentum_buffer"),
}
"""The optimisers whose steps are itemised, by class name."""

__all__ = ["RECURSIONS", "STILL", "Coefficient", "Itemised", "Recursion", "Values"]
