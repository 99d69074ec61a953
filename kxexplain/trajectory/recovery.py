"""Steps that were logged, but whose end was not recorded: they are made again, so that they can be explained."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from kxexplain.errors import ArgumentError
from kxexplain.trajectory.epochs import Epochs
from kxexplain.trajectory.replay import Replayer
from kxexplain.trajectory.states import State, capture_state, encode, finite
from kxexplain.trajectory.store import Writer
from kxexplain.trajectory.trajectory import Trajectory


def recover(trajectory: Trajectory, model: nn.Module, dataset: Any) -> Trajectory:
    """Replay the steps logged after the last state, and record the state behind them; returns the longer trajectory.

    A loop that was killed, or whose weights were spoilt before it stopped (a gradient that was not finite, a step that
    went past the recorder), leaves ``trajectory.tail`` steps that nothing can be explained with, for want of the state
    that they led to. It is found here in the time that training took for them, up to the last step after which every
    parameter is finite; later ones are dropped. ``kx.record(resume=True)`` goes on from there. Where there is nothing
    to recover, the trajectory is returned as it is.

    Raises:
        ModelError: not the recorded architecture.
        DatasetError: not the recorded examples.
        ArgumentError: a run of :func:`kxexplain.train` with a scheduler or a schedule, whose state cannot be found in
            this way; ``resume=True`` makes its steps again.

    >>> import tempfile, torch, kxexplain as kx
    >>> data, model = kx.datasets.toy(20), nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> recorder = kx.record(model, optimizer, "cross_entropy", data.train, out=tempfile.mkdtemp())
    >>> inputs, targets = data.train.tensors
    >>> try:
    ...     with recorder:
    ...         for step in range(3):
    ...             optimizer.zero_grad()
    ...             nn.functional.cross_entropy(model(inputs[:4]), targets[:4]).backward()
    ...             optimizer.step()
    ...             recorder.step(range(4), float("inf") if step == 2 else None)
    ... except kx.TrainingError:
    ...     trajectory = recorder.trajectory
    >>> len(trajectory), trajectory.tail
    (0, 2)
    >>> len(recover(trajectory, model, data.train))
    2
    """
    settings = Trajectory.required(trajectory).manifest.settings
    for name in ("scheduler", "schedule"):
        if settings.get(name) is not None:
            raise ArgumentError(
                f"{trajectory.path} was trained with a {name}, whose state replay does not find; go on with "
                "kx.train(resume=True), which makes the steps after the last state again"
            )
    if not trajectory.tail:
        return trajectory
    start, logged = len(trajectory), trajectory.again(whole=True)
    with Replayer(logged, model, dataset) as replayer:
        good = _advanced(replayer, start, len(logged))
        if replayer.position > good > start:
            _advanced(replayer, start, good)
        state = _state(replayer)
    if good > start:
        epochs = Epochs.after(trajectory, trajectory.state(start))
        for step in logged.steps[start:good]:
            epochs.step(step.epoch, len(step.indices))
        state = replace(state, extra=epochs.noted)
        writer = Writer.reopen(trajectory.path, trajectory.states, good)
        try:
            writer.put_state(good, partial(encode, state), kept=False)
        finally:
            writer.close()
    return trajectory.again()


def _advanced(replayer: Replayer, start: int, stop: int) -> int:
    """Go from one step to another; returns the last one with finite weights."""
    replayer.seek(start)
    while replayer.position < stop:
        replayer.advance()
        if not finite(_state(replayer)):
            return replayer.position - 1
    return stop


def _state(replayer: Replayer) -> State:
    return capture_state(replayer.position, replayer.model, replayer.optimizer, rng=replayer.generators)
