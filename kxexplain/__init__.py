"""kxexplain: predictions of trained networks, itemised over their training examples, exactly.

A network trained by gradient descent is a kernel machine (Domingos 2020): its prediction is its initial output
plus a sum over the training examples. Record training, and read the sum off:

>>> import tempfile, torch
>>> import kxexplain as kx
>>> data = kx.datasets.digits()
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
>>> trajectory = kx.train(model, data.train, epochs=2, out=tempfile.mkdtemp(), progress=False)
>>> explanation = kx.explain(trajectory, model, data.train, data.test[:3][0])
>>> bill = explanation.baseline + explanation.contributions.sum(1) + explanation.remainder
>>> torch.allclose(bill, explanation.prediction, atol=1e-5)
True
"""

from typing import TYPE_CHECKING, Any

from kxexplain import datasets
from kxexplain.attribution import Explanation, Ranking, Timeline, explain
from kxexplain.errors import (
    ArgumentError,
    DatasetError,
    IndexFileError,
    KxError,
    MissingExtraError,
    ModelError,
    ReplayError,
    TargetError,
    TrainingError,
    TrajectoryError,
    UnattributedWarning,
)
from kxexplain.kernels import path_kernel, tangent_kernel
from kxexplain.learning.comparison import Comparison
from kxexplain.learning.incremental import IncrementalModel, Merged
from kxexplain.learning.incremental.alternatives import Update, Updates, compare_updates
from kxexplain.learning.removal import Removal, compare_removal, retrain, subtract
from kxexplain.learning.svm import compare_svm
from kxexplain.learning.trainer import train
from kxexplain.search import GradientIndex, Neighbors
from kxexplain.trajectory import Recorder, Trajectory, import_checkpoints, record

if TYPE_CHECKING:
    from kxexplain.learning.incremental.estimator import IncrementalClassifier

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 - grouped by what they are for
    # record
    "train", "record", "import_checkpoints", "Recorder", "Trajectory",
    # explain
    "explain", "Explanation", "Ranking", "Timeline",
    # kernels
    "tangent_kernel", "path_kernel",
    # search and compare
    "GradientIndex", "Neighbors", "compare_svm", "Comparison",
    # learn without retraining
    "IncrementalModel", "IncrementalClassifier", "Merged", "compare_updates", "Update", "Updates",
    "subtract", "retrain", "compare_removal", "Removal",
    # data
    "datasets",
    # errors and the warning
    "KxError", "ArgumentError", "DatasetError", "IndexFileError", "MissingExtraError", "ModelError", "ReplayError",
    "TargetError", "TrainingError", "TrajectoryError", "UnattributedWarning",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The estimator is imported when it is asked for: scikit-learn takes a second, and nothing else here needs it."""
    if name == "IncrementalClassifier":
        from kxexplain.learning.incremental.estimator import IncrementalClassifier

        return IncrementalClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
