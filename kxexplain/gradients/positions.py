"""Many uses of one matrix, one position each (a recurrent layer's times, a loop over tokens), seen as one sequence."""

from __future__ import annotations

from dataclasses import replace

import torch

from kxexplain.gradients.factors import Factors, Outer, compact

MANY = 3
"""Uses from which on joining pays: fewer are as quickly multiplied two by two, and keep what is known of their
inputs."""


def joined(factors: Factors) -> Factors:
    """Outer products of the same matrix and bias as one, position after position; order is kept otherwise.

    t uses on either side would meet in t² small products; as a sequence of t positions they meet in one, or are
    written out where that takes fewer operations (:func:`~kxexplain.gradients.factors.compact`).
    """
    if len(factors) - len({f.weight for f in factors}) < MANY - 1:  # no matrix is used so often
        return factors
    groups: dict[object, list[int]] = {}
    for place, factor in enumerate(factors):
        if isinstance(factor, Outer):
            key = (factor.weight, factor.bias, factor.transposed, factor.a.shape[::2], factor.g.shape[::3])
            groups.setdefault(key, []).append(place)
    found: dict[int, Factors] = {}
    for places in groups.values():
        if len(places) < MANY:
            continue
        outers = [f for f in (factors[place] for place in places) if isinstance(f, Outer)]
        a, g = torch.cat([f.a for f in outers], 1), torch.cat([f.g for f in outers], 2)
        sequence = compact(replace(outers[0], a=a, g=g, raw=None))
        found |= {place: sequence if place == places[0] else [] for place in places}
    return [part for place, factor in enumerate(factors) for part in found.get(place, [factor])]
