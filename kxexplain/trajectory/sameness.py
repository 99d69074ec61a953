"""Is it the same run? What must agree for a recorded run to be gone on with."""

from __future__ import annotations

from kxexplain.errors import ArgumentError
from kxexplain.trajectory.clipping import CLIP_NORM, CLIP_VALUE
from kxexplain.trajectory.objective import OBJECTIVE
from kxexplain.trajectory.records import Manifest


def check_same(old: Manifest, new: Manifest, *, stepped: bool) -> None:
    """``ArgumentError`` naming the first setting in which a run to resume differs from now."""
    if not old.logged:
        raise ArgumentError(
            "cannot resume what was made of checkpoints: it has no step log to go on with; give a new folder"
        )
    difference = old.dataset.difference(new.dataset)
    if difference:
        raise ArgumentError(f"cannot resume with another dataset: {difference}")
    for name in ("loss", "seed", "keep", "reduction"):
        _same(name, getattr(old, name), getattr(new, name))
    for name in ("loop", "batch_size", "scheduler", "schedule", OBJECTIVE, CLIP_NORM, CLIP_VALUE):
        _same(name, old.settings.get(name), new.settings.get(name))
    _same("frozen parameters", _frozen(old), _frozen(new))
    _same("optimizer", old.optimizer.name, new.optimizer.name)
    _same("parameter groups", len(old.optimizer.groups), len(new.optimizer.groups))
    for ours, theirs in zip(old.optimizer.groups, new.optimizer.groups, strict=True):
        _same("optimizer parameters", ours.names, theirs.names)
        for key in sorted(ours.options.keys() | theirs.options.keys()):
            if not (stepped and key == "lr"):  # the scheduler has moved it meanwhile
                _same(f"optimizer option {key}", ours.options.get(key), theirs.options.get(key))


def _frozen(manifest: Manifest) -> list[str]:
    return [t.name for t in manifest.model.parameters if not t.requires_grad]


def _same(name: str, old: object, new: object) -> None:
    if old != new:
        raise ArgumentError(
            f"cannot resume with another {name}: the run was begun with {old!r}, not {new!r}; "
            "give what it was begun with, or another folder"
        )
