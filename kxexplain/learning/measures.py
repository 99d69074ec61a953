"""Numbers that describe a Gram matrix: how it fits the labels, how many directions it has."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def centred(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """H K H with H = I − 11ᵀ/n: the kernel of features whose mean is taken away."""
    rows = gram.mean(0, keepdim=True)
    return gram - rows - gram.mean(1, keepdim=True) + rows.mean()


def alignment(gram: Float[Tensor, "n n"], labels: Int[Tensor, " n"]) -> float:
    r"""Centred kernel-target alignment: the cosine between K and the labels' kernel [y = y'], both centred.

    1 for a kernel that tells equal labels from different ones and nothing else; near 0 for one that knows nothing of
    the labels.

    Source: Cortes, Mohri & Rostamizadeh 2012, "Algorithms for Learning Kernels Based on Centered Alignment".

    >>> import torch
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> alignment((labels[:, None] == labels).double(), labels)
    1.0
    """
    same = centred((labels[:, None] == labels).double())
    own = centred(gram.double())
    norm = float(own.norm() * same.norm())
    return round(float((own * same).sum()) / norm, 12) if norm > 0 else float("nan")


def effective_rank(gram: Float[Tensor, "n n"]) -> float:
    r"""(tr K)² / tr K² of the centred matrix: the number of equal eigenvalues that would give these two.

    >>> import torch
    >>> round(effective_rank(torch.eye(5)), 6)
    4.0
    """
    own = centred(gram.double())
    squares = float(own.square().sum())
    return float(own.trace()) ** 2 / squares if squares > 0 else float("nan")


__all__ = ["alignment", "centred", "effective_rank"]
