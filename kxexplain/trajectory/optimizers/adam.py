"""torch.optim.Adam and AdamW: m ← β₁ m + (1 − β₁) g, p ← p − η/(1 − β₁ᵗ) · m / (√v̂ + ε).

v̂ is the bias-corrected mean of squared gradients (AMSGrad: its largest value so far), known once the step is made.
AdamW decays the parameter itself, Adam adds λp to the gradient. Kingma & Ba 2015; Loshchilov & Hutter 2019.
"""

from __future__ import annotations

from kxexplain.trajectory.optimizers.recursion import Recursion, Values


def adam(options: Values, rate: float, before: Values, after: Values) -> Recursion:
    """Adam; with ``decoupled_weight_decay`` AdamW."""
    (first, second), step = options["betas"], float(after["step"])
    squares = after["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"]
    scale = squares.sqrt() / (1 - second**step) ** 0.5 + float(options["eps"])
    decay = float(options.get("weight_decay", 0))
    decoupled = bool(options.get("decoupled_weight_decay"))
    return Recursion(
        intake=1 - first,
        memory=first,
        applied=rate / (1 - first**step) / scale,
        shrink=rate * decay if decoupled else 0.0,
        l2=0.0 if decoupled else decay,
        sign=-1.0 if options.get("maximize") else 1.0,
    )


def adamw(options: Values, rate: float, before: Values, after: Values) -> Recursion:
    """AdamW, whose decay is decoupled whatever its group says."""
    return adam({**options, "decoupled_weight_decay": True}, rate, before, after)
