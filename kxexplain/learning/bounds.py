r"""What convex theory guarantees of a recorded run, both sides of every inequality.

With η_t and G_t the rate and the gradient's norm at step t = 1 … T, d = ‖θ_1 − θ*‖ the distance from the start to a
minimiser, and gap_t = L(θ_t) − L(θ*) at the point where step t begins, a convex L has for any rates

    Σ η_t gap_t / Σ η_t ≤ (d² + Σ η_t² G_t²) / (2 Σ η_t)                                    (regret; Zinkevich 2003)
    gap_T ≤ d² / (2 Σ η_t) + ½ Σ_t η_t² G_t² / Σ_{s ≥ min(t+1, T)} η_s   (last iterate; Defazio et al. 2023, 2310.07831)

and for the rates of a schedule with radius R (with d = R, and for adagrad_norm D = R, the forms usually quoted):

    adagrad_norm    Σ gap_t / T ≤ (D²/(2R) + R) √ΣG_t² / T      D the largest distance of any θ_t from θ*
    inverse_square  Σ η_t gap_t / Σ η_t ≤ (d²/R + R (1 + ln(Q_T/Q_1))) / (2 √Q_T)
    last_iterate    gap_T ≤ ½ √(V_T/T) (d²/R + R (2 + ln T))    where the rates do not rise

In hindsight, R √ΣG² / T is the least bound on the mean gap that one constant rate can have, and R / √Q_T the least that
any rates can; 2R / √Q_T is the continuous optimum of the last iterate's bound. With batches instead of all examples
these hold in expectation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, TrainingError
from kxexplain.learning.lagged import LaggedSum
from kxexplain.learning.rates import NormSums, Rates
from kxexplain.trajectory import LossFunction, Trajectory, call, fetch, resolve
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.observe import gradient_norm

CLOSE, NOTHING = 1e-6, 1e-14
"""A minimum is found to this part of it, or is zero."""

MEAN, WEIGHTED, LAST = "mean gap", "weighted mean gap", "last gap"
"""What a guarantee is about: the plain and the η-weighted mean over all steps, and the last step's."""


def weighted_mean_bound(rates: Rates, norms: Rates, distance: float) -> float:
    """(d² + Σ η² G²) / (2 Σ η), of the η-weighted mean gap.

    >>> weighted_mean_bound(np.full(4, 0.5), np.ones(4), distance=1.0)  # d G / √T
    0.5
    """
    return float((distance**2 + np.sum((rates * norms) ** 2)) / (2 * np.sum(rates)))


def last_bound(rates: Rates, norms: Rates, distance: float) -> float:
    """d² / (2 Σ η) + ½ Σ_t η_t² G_t² / Σ_{s ≥ min(t+1, T)} η_s, of the last gap; infinite where the last rate is 0.

    >>> last_bound(np.array([1.0]), np.array([1.0]), distance=1.0)
    1.0
    """
    tails = np.cumsum(rates[::-1])[::-1]
    behind = np.append(tails[1:], tails[-1])
    if behind[-1] == 0:
        return math.inf
    return float(distance**2 / (2 * tails[0]) + 0.5 * np.sum((rates * norms) ** 2 / behind))


def adagrad_norm_bound(norms: Rates, radius: float, farthest: float) -> float:
    """(D²/(2R) + R) √ΣG² / T, of the mean gap; 3R √ΣG² / (2T) where no θ_t is farther than R from the minimiser."""
    return float((farthest**2 / (2 * radius) + radius) * np.sqrt(np.sum(norms**2)) / len(norms))


def inverse_square_bound(norms: Rates, radius: float, distance: float, floor: float) -> float:
    """(d²/R + R (1 + ln(Q_T/Q_1))) / (2 √Q_T), of the η-weighted mean gap; norms floored as in the rates."""
    sums = NormSums(floor)
    first = 0.0
    for norm in norms:
        sums.add(float(norm))
        first = first or sums.inverses
    spread = 1 + math.log(sums.inverses / first)
    return sums.unit * (distance**2 / radius + radius * spread) / (2 * math.sqrt(sums.inverses))


def last_iterate_bound(norms: Rates, radius: float, distance: float) -> float:
    """½ √(V_T/T) (d²/R + R (2 + ln T)), of the last gap, where the rates do not rise."""
    sums = LaggedSum((norms[:-1] ** 2).tolist())
    root = math.sqrt(sums.add(float(norms[-1] ** 2)) / len(norms))
    return root * (distance**2 / radius + radius * (2 + math.log(len(norms)))) / 2


def constant_optimum_bound(norms: Rates, distance: float) -> float:
    """D √ΣG² / T: the least that the mean gap's bound can be with one constant rate."""
    return float(distance * np.sqrt(np.sum(norms**2)) / len(norms))


def inverse_square_optimum_bound(norms: Rates, distance: float) -> float:
    """D / √Q_T: the least that the weighted mean gap's bound can be with any rates."""
    return float(distance / np.sqrt(np.sum(norms**-2.0)))


def continuous_optimum(norms: Rates, distance: float) -> float:
    """2d / √Q_T: the least that the last gap's bound can be, in the limit of many small steps."""
    return 2 * inverse_square_optimum_bound(norms, distance)


@dataclass(frozen=True)
class Guarantee:
    """One inequality, evaluated.

    Attributes:
        name: "any rates", or the schedule whose own guarantee it is.
        of: what it bounds, "mean gap", "weighted mean gap" or "last gap".
        right: the bound.
        left: the measured gap; ``None`` where the minimum is not known.
        applies: whether its condition is met (rates that do not rise).
    """

    name: str
    of: str
    right: float
    left: float | None
    applies: bool = True

    @property
    def holds(self) -> bool | None:
        """Whether the gap is below the bound, but for rounding; ``None`` where that does not apply or is unknown."""
        return None if self.left is None or not self.applies else self.left <= self.right * (1 + 1e-9)


@dataclass(frozen=True, eq=False)
class Bounds:
    """The guarantees of a run.

    Attributes:
        rates: η_t, [step].
        norms: G_t, [step].
        distance: from the first parameters to the minimiser.
        guarantees: those for any rates, then the schedule's own.
        gaps: L(θ_t) − L(θ*), [step], where the minimum is known.
        optimum: 2d / √Q_T, the continuous optimum of the last gap's bound.
        full: whether every step used all examples, so that gaps and norms are those of L itself.
    """

    rates: Rates
    norms: Rates
    distance: float
    guarantees: tuple[Guarantee, ...]
    gaps: Rates | None
    optimum: float
    full: bool

    def table(self) -> Table:
        """Both sides of every guarantee, to print."""
        table = Table("guarantee", "of", "measured", "bound", "holds")
        words = {None: "–", True: "yes", False: "no"}
        for one in self.guarantees:
            left = "–" if one.left is None else f"{one.left:.4g}"
            table.add_row(one.name, one.of, left, f"{one.right:.4g}", words[one.holds])
        table.add_row("continuous optimum", LAST, "", f"{self.optimum:.4g}", "")
        return table

    def __str__(self) -> str:
        with open(os.devnull, "w") as nowhere:
            console = Console(width=78, file=nowhere, record=True, force_jupyter=False)
            console.print(self.table())
            return console.export_text().rstrip()

    def plot(self, **options: Any) -> Any:
        """Gaps and bounds along the run: :func:`kxexplain.plot_bounds`."""
        from kxexplain.plots import plot_bounds

        return plot_bounds(self, **options)


def bounds(
    trajectory: Trajectory,
    minimizer: nn.Module | Mapping[str, Tensor] | None = None,
    minimum: float | None = None,
    *,
    distance: float | None = None,
    norms: Sequence[float] | None = None,
) -> Bounds:
    """Evaluate what convex theory guarantees of a recorded run.

    Args:
        trajectory: of plain SGD (no momentum, no decay, one rate), descending in every step.
        minimizer: a model that holds a minimiser θ*, or its parameters by name; any other point will do as well, and
            gaps are then those to its loss.
        minimum: the loss there; without it only the right-hand sides are known. See :func:`minimize`.
        distance: ‖θ_0 − θ*‖ instead of a minimiser.
        norms: every step's gradient norm, where the run was recorded without (:func:`kxexplain.gradient_norms`).

    Returns:
        Both sides; the gaps are measured by the losses that were logged, those of the batches.

    Raises:
        ArgumentError: neither a minimiser nor a distance, or both; one that does not fit; or a run that the guarantees
            do not cover.

    >>> import tempfile, kxexplain as kx
    >>> data = torch.utils.data.TensorDataset(torch.ones(4, 1), torch.full((4,), 2.0))
    >>> model = nn.Linear(1, 1, bias=False)
    >>> run = kx.train(
    ...     model,
    ...     data,
    ...     "mse",
    ...     schedule=kx.Schedule("inverse_square", radius=2.0),
    ...     epochs=20,
    ...     batch_size=4,
    ...     keep="step",
    ...     out=tempfile.mkdtemp(),
    ...     progress=False,
    ... )
    >>> found = bounds(run, {"weight": torch.tensor([[2.0]])}, minimum=0.0)
    >>> [one.holds for one in found.guarantees]
    [True, True, True]
    """
    if (minimizer is None) == (distance is None):
        raise ArgumentError("give the minimizer, or the distance to one, and not both")
    rates, sizes = _steps(trajectory, norms)
    farthest = None
    if minimizer is not None:
        distances = _distances(trajectory, minimizer)
        distance, farthest = distances[0], max(distances)
    assert distance is not None
    if not (math.isfinite(distance) and distance > 0):
        raise ArgumentError(f"the distance from the start to the minimizer must be a positive number, got {distance!r}")
    losses = np.array([step.loss for step in trajectory.steps])
    gaps = None if minimum is None else losses - minimum
    guarantees = [
        _measured("any rates", WEIGHTED, weighted_mean_bound(rates, sizes, distance), gaps, rates),
        _measured("any rates", LAST, last_bound(rates, sizes, distance), gaps, rates),
    ]
    own = _of_schedule(trajectory, rates, sizes, distance, farthest)
    if own is not None:
        guarantees.append(_measured(own[0], own[1], own[2], gaps, rates, applies=own[3]))
    full = all(len(step.indices) == trajectory.manifest.dataset.count for step in trajectory.steps)
    return Bounds(rates, sizes, distance, tuple(guarantees), gaps, continuous_optimum(sizes, distance), full)


def minimize(
    model: nn.Module, dataset: Any, loss: str | LossFunction = "cross_entropy", *, steps: int = 2000
) -> tuple[nn.Module, float]:
    """A minimiser of the mean loss over all examples, as a copy of ``model`` in float64, and the minimum.

    L-BFGS with a strong-Wolfe line search, for smooth convex problems; ``TrainingError`` if after so many iterations
    the gradient's norm times the distance from the start, which bounds the gap, is not below 1e-6 of the loss: no
    finite minimiser (separable classes), a kink, or not convex.

    >>> data = torch.utils.data.TensorDataset(torch.tensor([[1.0], [1.0]]), torch.tensor([0.0, 4.0]))
    >>> found, value = minimize(nn.Linear(1, 1, bias=False), data, "mse")
    >>> round(found.weight.item(), 6), round(value, 6)
    (2.0, 4.0)
    """
    best = private_copy(model).double()
    inputs, targets = fetch(dataset, range(len(dataset)), next(best.parameters()).device)
    inputs = _doubled(inputs)
    function = resolve(loss)[1]
    parameters = [p for p in best.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, max_eval=2 * steps, history_size=30,
        tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = function(call(best, inputs), targets).mean()
        value.backward()
        return value

    optimizer.step(closure)
    value = closure().item()
    norm = gradient_norm([p.grad for p in parameters if p.grad is not None])
    moved = gradient_norm([p.detach() - s for p, s in zip(parameters, start, strict=True)])
    if not (norm * moved <= CLOSE * value or value <= NOTHING):  # L(θ) − L(θ*) ≤ ‖∇L‖ ‖θ − θ*‖
        raise TrainingError(
            f"no minimizer was found: at a loss of {value:.3g}, {moved:.3g} from the start, the gradient's norm is "
            f"{norm:.1e} after up to {steps} iterations; the loss must be "
            "smooth and convex in the parameters, and have a minimizer (separable classes have none)"
        )
    best.zero_grad(set_to_none=True)
    return best, value


def _steps(trajectory: Trajectory, given: Sequence[float] | None) -> tuple[Rates, Rates]:
    """Rates and norms; a clipped gradient counts as it was, and its factor to the rate."""
    manifest = trajectory.manifest
    options = [group.options for group in manifest.optimizer.groups]
    plain = manifest.optimizer.name == "SGD" and not any(o.get("momentum") or o.get("weight_decay") for o in options)
    steps = list(trajectory.steps)
    if not plain or not manifest.logged or any(len(set(step.rates)) > 1 for step in steps):
        raise ArgumentError(
            f"{trajectory.path} was trained with {manifest.optimizer.title}; the guarantees are for recorded steps of "
            "plain SGD, without momentum or weight decay, and one rate for all parameters"
        )
    if not steps or any(step.sign < 0 for step in steps):
        raise ArgumentError(f"{trajectory.path} has no steps, or some that ascend; the guarantees are for descent")
    factors = np.array([step.clip for step in steps])
    norms = np.array(trajectory.norms() if given is None else given, dtype=float)
    if norms.shape != (len(steps),) or not np.isfinite(norms).all():
        raise ArgumentError(
            f"got {len(norms)} norms, but {trajectory.path} has {len(steps)} steps; give a finite one for each"
        )
    if (norms <= 0).any() or (factors <= 0).any():
        raise ArgumentError(f"a gradient of {trajectory.path} is zero: the minimum was reached before the last step")
    return np.array([step.rates[0] for step in steps]) * factors, norms / factors


def _distances(trajectory: Trajectory, minimizer: nn.Module | Mapping[str, Tensor]) -> list[float]:
    """‖θ_s − θ*‖ of every recorded state."""
    given = dict(minimizer.named_parameters()) if isinstance(minimizer, nn.Module) else dict(minimizer)
    names = [name for group in trajectory.manifest.optimizer.groups for name in group.names]
    first = trajectory.state(0).parameters
    wrong = [name for name in names if name not in given or given[name].shape != first[name].shape]
    if wrong:
        raise ArgumentError(f"the minimizer has no parameter {wrong[0]!r} of shape {tuple(first[wrong[0]].shape)}")
    goal = {name: given[name].detach().double().cpu() for name in names}
    states = (trajectory.state(record.step).parameters for record in trajectory.states)
    return [gradient_norm([state[name].double() - goal[name] for name in names]) for state in states]


def _of_schedule(
    trajectory: Trajectory, rates: Rates, norms: Rates, distance: float, farthest: float | None
) -> tuple[str, str, float, bool] | None:
    """The schedule's own guarantee, if it has one: (its name, what it bounds, the bound, whether it applies)."""
    noted = trajectory.manifest.settings.get("schedule") or {}
    name, radius = noted.get("name"), noted.get("radius")
    if radius is None:  # one that was estimated changes from step to step
        return None
    if name == "adagrad_norm" and farthest is not None:
        whole = len(trajectory.states) == len(trajectory) + 1
        return name, MEAN, adagrad_norm_bound(norms, radius, farthest), whole
    if name == "inverse_square":
        return name, WEIGHTED, inverse_square_bound(norms, radius, distance, noted["floor"]), True
    if name == "last_iterate":
        return (
            name,
            LAST,
            last_iterate_bound(norms, radius, distance),
            bool((np.diff(rates) <= 1e-12 * rates[:-1]).all()),
        )
    return None


def _measured(name: str, of: str, right: float, gaps: Rates | None, rates: Rates, *, applies: bool = True) -> Guarantee:
    if gaps is None:
        return Guarantee(name, of, right, None, applies)
    left = {MEAN: gaps.mean(), WEIGHTED: np.average(gaps, weights=rates), LAST: gaps[-1]}[of]
    return Guarantee(name, of, right, float(left), applies)


def _doubled(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: _doubled(value) for key, value in inputs.items()}
    return tuple(_doubled(value) for value in inputs)


__all__ = ["Bounds", "Guarantee", "bounds", "minimize"]
