"""Steps that were logged, but whose end was not recorded: they are made again, so that they can be explained."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from kxexplain.errors import ArgumentError
from kxexplain.trajectory import keep as keeping
from kxexplain.trajectory.epochs import Epochs
from kxexplain.trajectory.replay import Replayer
from kxexplain.trajectory.states import State, capture_state, encode, finite, owned
from kxexplain.trajectory.store import Writer
from kxexplain.trajectory.trajectory import Trajectory


def recover(trajectory: Trajectory, model: nn.Module, dataset: Any) -> Trajectory:
    """Replay the steps logged after the last state, and record the state behind them; returns the longer trajectory.

    A loop that was killed, or whose weights were spoilt before it stopped (a gradient that was not finite, a step that
    went past the recorder), leaves ``trajectory.tail`` steps that nothing can be explained with, for want of the state
    that they led to. It is found here in the time that training took for them (twice that, where weights were spoilt),
    up to the last step after which every parameter is finite; later ones are left in the log. States on the way are
    kept as the run would have kept them, and ``kx.record(resume=True)`` goes on from the last. Nobody may be recording
    into the folder meanwhile.

    Raises:
        ModelError: not the recorded architecture.
        DatasetError: not the recorded examples.
        ArgumentError: there is something to recover, but of a run of :func:`kxexplain.train` with a scheduler or a
            schedule, whose state cannot be found in this way; ``resume=True`` makes its steps again.

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
    trajectory = Trajectory.required(trajectory).again()  # as it is now
    if not trajectory.tail:
        return trajectory
    if trajectory.manifest.scheduled is not None:
        raise ArgumentError(
            f"{trajectory.path} was trained with a {trajectory.manifest.scheduled}, whose state replay does not find; "
            "go on with kx.train(resume=True), which makes the steps after the last state again"
        )
    logged = trajectory.again(whole=True)
    with Replayer(logged, model, dataset) as replayer:
        writer = Writer.reopen(trajectory.path, trajectory.states, len(logged))
        try:
            _write(replayer, writer, trajectory)
        finally:
            writer.close()
    return trajectory.again()


def _write(replayer: Replayer, writer: Writer, trajectory: Trajectory) -> None:
    """Record the states that the run would have kept, and the last one with finite weights."""
    start = last = len(trajectory)
    keep = keeping.noted(trajectory.manifest.keep, trajectory.fact("stride"))
    epochs = Epochs.after(trajectory, trajectory.state(start))
    waiting = False  # whether the last good step has no state yet
    replayer.seek(start)
    for step in replayer.trajectory.steps[start:]:
        replayer.advance()
        state = _state(replayer)
        if not finite(state):
            break
        last = state.step
        _, ended = epochs.step(step.epoch, len(step.indices))
        waiting = not keep.wants(last, epoch_ended=ended)
        if not waiting:
            writer.put_state(last, partial(encode, owned(replace(state, extra=epochs.noted))), kept=True)
    if waiting:
        if replayer.position > last:
            replayer.seek(start)
            while replayer.position < last:
                replayer.advance()
        writer.put_state(last, partial(encode, replace(_state(replayer), extra=epochs.noted)), kept=False)


def _state(replayer: Replayer) -> State:
    return capture_state(replayer.position, replayer.model, replayer.optimizer, rng=replayer.generators)
