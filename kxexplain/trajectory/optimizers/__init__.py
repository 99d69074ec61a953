"""How each optimiser's step divides among the examples: a formula a file, a line in the table.

To add one: write a function that gives its :class:`Recursion` (the formula beside it), and a line in
:data:`RECURSIONS`. The tests' table of optimisers then holds it to completeness and to a forward propagation of every
example's share.
"""

from kxexplain.trajectory.optimizers.adam import adam, adamw
from kxexplain.trajectory.optimizers.adaptive import adagrad, rmsprop
from kxexplain.trajectory.optimizers.recursion import STILL, Coefficient, Recursion, Rule, Values
from kxexplain.trajectory.optimizers.sgd import sgd

RECURSIONS: dict[str, Rule] = {
    "SGD": sgd, "Adam": adam, "AdamW": adamw, "Adagrad": adagrad, "RMSprop": rmsprop,
}  # fmt: skip
"""The optimisers whose steps are itemised, by class name."""

__all__ = ["RECURSIONS", "STILL", "Coefficient", "Recursion", "Rule", "Values"]
