"""Objectives for a loop of one's own: what :func:`kxexplain.train` does for ``objective=``, as functions.

Which of them a recorded loop uses, ``kx.record(objective=...)`` must know; the direction of a step is told to
``recorder.step(sign=..., clip=...)``:

    objective = kx.Objective(flooding=0.05, parameter_penalty=0.01)
    with kx.record(model, optimizer, "cross_entropy", data, out=out, objective=objective) as recorder:
        …
        loss = cross_entropy(model(x), y)
        loss = loss + 0.01 * kx.parameter_penalty(loss, list(model.parameters()))
        sign, factor = objective.direction(recorder.position, loss.item())
        (sign * factor * loss).backward()
        optimizer.step()
        recorder.step(indices, sign=sign, clip=factor)
"""

from __future__ import annotations

from torch import Tensor

from kxexplain.trajectory.objective import Objective, input_penalty, parameter_penalty


def flooded(loss: Tensor, level: float) -> Tensor:
    """|L − b| + b: the loss above the level b, its mirror image below; Ishida et al. 2020 (arXiv 2002.08709).

    Its gradient is that of L times the sign that ``Objective(flooding=level).direction`` gives.

    >>> import torch
    >>> flooded(torch.tensor([0.3, 0.1]), 0.2)
    tensor([0.3000, 0.3000])
    """
    above = loss - level
    return level + above * (1 - 2 * (above < 0).to(loss.dtype))


__all__ = ["Objective", "flooded", "input_penalty", "parameter_penalty"]
