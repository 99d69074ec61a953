"""A learning rate that follows the measured gradient, as a scheduler for any loop of PyTorch's."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from kxexplain.errors import ArgumentError, TrainingError
from kxexplain.learning import rates as formulas
from kxexplain.learning.lagged import LaggedSum
from kxexplain.learning.rates import COORDINATES, HINDSIGHT, HORIZON, PLAIN, NormSums
from kxexplain.learning.schedules import Schedule, distance_travelled
from kxexplain.learning.travelled import Travelled
from kxexplain.trajectory import Trajectory
from kxexplain.trajectory.observe import gradient_norm
from kxexplain.trajectory.states import rates as rates_of
from kxexplain.trajectory.states import set_rates


class GradientSchedule(LRScheduler):
    """Sets an optimiser's learning rate just before every step, from the gradient that the step is made of.

    Args:
        optimizer: of ``torch.optim`` or a class of one's own, already over all its parameters. A group's rate is the
            schedule's, times what its own ``lr`` is of the largest; the norm is that of all groups' gradients together,
            as it stands when ``optimizer.step()`` is called (after clipping). The guarantees are for plain SGD;
            ``"adagrad"`` needs ``torch.optim.Adagrad``.
        schedule: a name, or a :class:`Schedule` with its radius.
        steps: T, for the schedules that must know it.

    It works by a hook on ``optimizer.step``, a ``closure`` included, so ``step()`` of the schedule itself may be called
    once a step, once an epoch or never: it only notes the present rates. ``state_dict()`` holds numbers and, where the
    radius is estimated, the initial parameters. A schedule attached later to the same optimiser takes the place of this
    one; :meth:`detach` lets go of it.

    Raises:
        ArgumentError: ``steps`` missing, or not those of the earlier run; an optimiser that does not fit.
        TrainingError: (from ``optimizer.step()``) a gradient norm that is not finite, or a step after the last; the
            parameters are left as they are.

    >>> parameter = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = torch.optim.SGD([parameter], lr=1.0)
    >>> schedule = GradientSchedule(optimizer, Schedule("adagrad_norm", radius=3.0))
    >>> for _ in range(50):
    ...     optimizer.zero_grad()
    ...     parameter.abs().sum().backward()
    ...     optimizer.step()
    ...     schedule.step()
    >>> parameter.abs().item() < 0.5, round(schedule.get_last_lr()[0] * 50**0.5, 12)
    (True, 3.0)
    """

    def __init__(self, optimizer: Optimizer, schedule: str | Schedule, steps: int | None = None) -> None:
        asked = Schedule.asked(schedule)
        if asked is None:
            raise ArgumentError("schedule is None, expected a name or a kx.Schedule")
        self.schedule = asked
        self._check(optimizer, steps)
        self.steps = steps if steps is not None and asked.name in (*HORIZON, *PLAIN) else 0
        self._parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._fixed: list[float] | None = None
        self._radius = asked.radius
        self._travelled: Travelled | None = None
        if asked.name in HINDSIGHT:
            self._look_back(asked)
        elif asked.name not in PLAIN and asked.radius is None:
            self._travelled = Travelled(self._parameters, coordinates=asked.name == COORDINATES)
        self.sums = NormSums(asked.floor, history=LaggedSum() if asked.name == "last_iterate" else None)
        super().__init__(optimizer)
        self.last_epoch = 0
        self.base_lrs = [float(rate) for rate in self.base_lrs]
        if not max(self.base_lrs) > 0:
            raise ArgumentError(f"the optimizer's learning rates are {self.base_lrs}; give it at least one above zero")
        self._handle = _attach(optimizer, self)

    def detach(self) -> None:
        """Leave the optimiser alone from now on."""
        self._handle.remove()

    def get_lr(self) -> list[float | Tensor]:
        """The groups' present rates: those of the last step, once there was one."""
        return list(rates_of(self.optimizer))

    def step(self, epoch: int | None = None) -> None:
        """Note the present rates for ``get_last_lr()``; they were set when the optimiser stepped."""
        self._step_count += 1
        self._last_lr = self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on to the same rates, to the last bit."""
        sums = {key: value for key, value in vars(self.sums).items() if key != "history"}
        state: dict[str, Any] = {
            "name": self.schedule.name, "steps": self.steps, "radius": self._radius, "fixed": self._fixed,
            "sums": sums, "base_lrs": self.base_lrs, "last_epoch": self.last_epoch, "step_count": self._step_count,
            "last_lr": self.get_last_lr(),
        }  # fmt: skip
        if self.sums.history is not None:
            state["history"] = self.sums.history.values
        if self._travelled is not None:
            state |= {"travelled": self._travelled.largest, "origin": self._travelled.origin}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of the same schedule; ``ArgumentError`` if it is another one's."""
        estimated = "origin" in state_dict
        if state_dict.get("name") != self.schedule.name or estimated != (self._travelled is not None):
            raise ArgumentError(
                f"this is the state of {state_dict.get('name')!r}, its radius {'estimated' if estimated else 'given'}; "
                f"load it into such a schedule instead of {self.schedule!r}"
            )
        self.steps, self._radius, self._fixed = (state_dict[key] for key in ("steps", "radius", "fixed"))
        self.base_lrs, self.last_epoch = list(state_dict["base_lrs"]), state_dict["last_epoch"]
        self._step_count, self._last_lr = state_dict["step_count"], list(state_dict["last_lr"])
        history = LaggedSum(state_dict["history"]) if "history" in state_dict else None
        self.sums = NormSums(**state_dict["sums"], history=history)
        if self._travelled is not None:
            self._travelled.largest = state_dict["travelled"]
            pairs = zip(state_dict["origin"], self._parameters, strict=True)
            self._travelled.origin = [o.detach().to(p.device, p.dtype).clone() for o, p in pairs]

    def before_step(self, args: Any, kwargs: Any) -> Any:
        """Set the rate; the optimiser's hook. A closure is evaluated here, once, and the step is given its result."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        result = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            rest = {key: value for key, value in kwargs.items() if key != "closure"}
            result = ((args[0], lambda: loss, *args[2:]), rest)
        rate, own = self._rate(), [float(base) for base in self.base_lrs]
        unit = 1.0 if self.schedule.name in PLAIN else max(own)
        set_rates(self.optimizer, [rate * (base / unit) for base in own])
        return result

    def _rate(self) -> float:
        """The rate of the step that is about to be made."""
        name, number = self.schedule.name, self.last_epoch + 1
        if name in HORIZON and number > self.steps:
            raise TrainingError(
                f"{name} was made for {self.steps} steps, and this is step {number}; the parameters were left as they "
                "are. Give steps= the number of steps that training takes"
            )
        if name in formulas.CAUSAL:
            self.sums.add(gradient_norm([p.grad for p in self._parameters if p.grad is not None]))
        self.last_epoch = number
        if name in PLAIN:
            return PLAIN[name](number, self.steps)
        if self._fixed is not None:
            return self._fixed[number - 1]
        radius = self._radius
        if self._travelled is not None:
            radius = self._travelled.radius(self._parameters)
        assert radius is not None
        return radius if name == COORDINATES else formulas.rate(name, self.sums, self.steps, radius)

    def _look_back(self, asked: Schedule) -> None:
        """All rates, from an earlier run."""
        norms = asked.norms or []
        if len(norms) != self.steps:
            raise ArgumentError(
                f"the earlier run has {len(norms)} steps, and this one {self.steps}; give one of the same length"
            )
        if self._radius is None:
            if not isinstance(asked.earlier, Trajectory):
                raise ArgumentError("norms alone do not tell the radius; give radius=, or the earlier trajectory")
            self._radius = distance_travelled(asked.earlier)
        unit = formulas.hindsight(asked.name, norms, asked.floor, asked.smooth)
        self._fixed = [float(self._radius * rate) for rate in unit]

    def _check(self, optimizer: Any, steps: Any) -> None:
        name = self.schedule.name
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
            raise ArgumentError(
                f"got a {type(optimizer).__name__}, expected an optimizer that takes one gradient a step, such as "
                "torch.optim.SGD"
            )
        if name == COORDINATES and not isinstance(optimizer, torch.optim.Adagrad):
            raise ArgumentError(
                f"the schedule 'adagrad' is the rate of torch.optim.Adagrad, but the optimizer is "
                f"{type(optimizer).__name__}; give a torch.optim.Adagrad"
            )
        if steps is None and name not in HORIZON:
            return
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ArgumentError(f"{name} needs steps=, the number of optimizer steps as an integer >= 1; got {steps!r}")


_ATTACHED: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()


def _attach(optimizer: Optimizer, schedule: GradientSchedule) -> RemovableHandle:
    """The hook that sets the rate: the only one of its kind, and before any other, which may want to log the rate."""
    if optimizer in _ATTACHED:
        _ATTACHED[optimizer].remove()

    def before_step(_: Optimizer, args: Any, kwargs: Any) -> Any:
        return schedule.before_step(args, kwargs)

    hooks = optimizer._optimizer_step_pre_hooks
    others = dict(hooks)
    hooks.clear()
    handle = optimizer.register_step_pre_hook(before_step)
    hooks.update(others)
    _ATTACHED[optimizer] = handle
    return handle


__all__ = ["GradientSchedule"]
