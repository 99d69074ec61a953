"""Where an epoch ends, in a loop that may not say."""

from __future__ import annotations

from kxexplain.trajectory.states import State
from kxexplain.trajectory.trajectory import Trajectory


class Epochs:
    """Counts epochs by their examples: one ends when as many were used as the dataset has.

    >>> epochs = Epochs(count=5)
    >>> [epochs.step(None, 2) for _ in range(4)]
    [(0, False), (0, False), (0, True), (1, False)]
    """

    def __init__(self, count: int, epoch: int = 0, seen: int = 0) -> None:
        self.count, self.epoch, self.seen = count, epoch, seen

    @classmethod
    def after(cls, trajectory: Trajectory, state: State) -> Epochs:
        """As they were when this state was recorded."""
        count = trajectory.manifest.dataset.count
        epoch, seen = state.extra.get("epoch"), state.extra.get("seen")
        if isinstance(epoch, int) and isinstance(seen, int):
            return cls(count, epoch, seen)
        epochs = cls(count)  # recorded before states had their place in the epoch
        if state.step:
            last = trajectory.steps[state.step - 1].epoch
            before = trajectory.steps[max(0, state.step - count) : state.step]
            epochs.step(last, sum(len(step.indices) for step in before if step.epoch == last))
            if epochs.epoch > last:
                epochs.seen = 0
        return epochs

    @property
    def noted(self) -> dict[str, int]:
        """What a state keeps, for :meth:`after`."""
        return {"epoch": self.epoch, "seen": self.seen}

    def step(self, told: int | None, examples: int) -> tuple[int, bool]:
        """The epoch of a step of so many examples, and whether a state is due because an epoch has ended.

        Where a step is ``told`` its epoch, one also ends when that is a new one (the first step of it included).
        """
        late = told is not None and told != self.epoch and self.seen > 0
        if told is not None and told != self.epoch:
            self.epoch, self.seen = told, 0
        epoch = self.epoch
        self.seen += examples
        if self.seen >= self.count:
            self.epoch, self.seen = epoch + 1, self.seen - self.count
            return epoch, True
        return epoch, late
