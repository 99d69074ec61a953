"""The trajectory: what training went through, recorded, stored and replayed.

``record`` is what a loop calls and gives a :class:`Recorder`; ``import_checkpoints`` makes do with what an unrecorded
training left; :class:`Trajectory` opens the folder it writes; :class:`Replayer` redoes its steps, ``recover`` those of
a run that broke off; ``split`` says how an optimiser's step divides.
"""

from kxexplain.trajectory.batches import call, count, fetch, outputs_2d, take
from kxexplain.trajectory.fingerprints import Fingerprint, fingerprint
from kxexplain.trajectory.importing import import_checkpoints
from kxexplain.trajectory.losses import LOSSES, LossFunction, check_losses, resolve
from kxexplain.trajectory.objective import Objective
from kxexplain.trajectory.recorder import Recorder, record
from kxexplain.trajectory.records import (
    GroupRecord,
    Manifest,
    ModelSignature,
    OptimizerRecord,
    StateRecord,
    StepRecord,
    TensorRecord,
)
from kxexplain.trajectory.recovery import recover
from kxexplain.trajectory.replay import ReplayedStep, Replayer, Watch, gradient_norms
from kxexplain.trajectory.states import State
from kxexplain.trajectory.trajectory import Trajectory
from kxexplain.trajectory.updates import Split, split

__all__ = [
    "LOSSES",
    "Fingerprint",
    "GroupRecord",
    "LossFunction",
    "Manifest",
    "ModelSignature",
    "Objective",
    "OptimizerRecord",
    "Recorder",
    "ReplayedStep",
    "Replayer",
    "Split",
    "State",
    "StateRecord",
    "StepRecord",
    "TensorRecord",
    "Trajectory",
    "Watch",
    "call",
    "check_losses",
    "count",
    "fetch",
    "fingerprint",
    "gradient_norms",
    "import_checkpoints",
    "outputs_2d",
    "record",
    "recover",
    "resolve",
    "split",
    "take",
]
