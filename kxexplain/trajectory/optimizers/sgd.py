"""torch.optim.SGD: b ← μ b + (1 − τ) g, then p ← p − η b; with Nesterov's look-ahead p ← p − η (g + μ b).

The first b is g itself. Without momentum p ← p − η g.
"""

from __future__ import annotations

from kxexplain.trajectory.optimizers.recursion import Recursion, Values


def sgd(options: Values, rate: float, before: Values, after: Values) -> Recursion:
    """Momentum μ, dampening τ, Nesterov, weight decay in the gradient, maximise."""
    momentum, sign = float(options.get("momentum", 0)), -1.0 if options.get("maximize") else 1.0
    l2 = float(options.get("weight_decay", 0))
    if momentum == 0:
        return Recursion(direct=rate, l2=l2, sign=sign)
    first = before.get("momentum_buffer") is None
    nesterov = bool(options.get("nesterov"))
    return Recursion(
        direct=rate if nesterov else 0.0,
        intake=1.0 if first else 1.0 - float(options.get("dampening", 0)),
        memory=0.0 if first else momentum,
        applied=rate * momentum if nesterov else rate,
        l2=l2,
        sign=sign,
    )
