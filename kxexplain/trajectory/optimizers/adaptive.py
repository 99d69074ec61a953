"""torch.optim.Adagrad and RMSprop: the gradient divided by the root of its squares, summed up or averaged."""

from __future__ import annotations

from kxexplain.trajectory.optimizers.recursion import Recursion, Values


def adagrad(options: Values, rate: float, before: Values, after: Values) -> Recursion:
    """Without a moment: p ← p − η/(1 + (t − 1) δ) · g / (√Σg² + ε). Duchi, Hazan & Singer 2011."""
    rate = rate / (1 + (float(after["step"]) - 1) * float(options.get("lr_decay", 0)))
    return Recursion(
        direct=rate / (after["sum"].sqrt() + float(options["eps"])),
        l2=float(options.get("weight_decay", 0)),
        sign=-1.0 if options.get("maximize") else 1.0,
    )


def rmsprop(options: Values, rate: float, before: Values, after: Values) -> Recursion:
    """Without momentum p ← p − η g / (√v + ε); with momentum b ← μ b + g/(√v + ε), p ← p − η b.

    Centred, v is less the squared mean gradient.
    """
    squares = after["square_avg"]
    if options.get("centered"):
        squares = squares - after["grad_avg"].square()
    inverse = 1 / (squares.sqrt() + float(options["eps"]))
    momentum = float(options.get("momentum", 0))
    l2, sign = float(options.get("weight_decay", 0)), -1.0 if options.get("maximize") else 1.0
    if momentum == 0:
        return Recursion(direct=rate * inverse, l2=l2, sign=sign)
    return Recursion(intake=inverse, memory=momentum, applied=rate, l2=l2, sign=sign)
