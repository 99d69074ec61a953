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

from typing import Any

from kxexplain import datasets
from kxexplain.attribution import Explanation, Ranking, Timeline, explain
from kxexplain.errors import (
    ArgumentError,
    DatasetError,
    IncompleteWarning,
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
from kxexplain.learning.bounds import Bounds, bounds, minimize
from kxexplain.learning.comparison import Comparison
from kxexplain.learning.diagnostics import GradientInequality, gradient_inequality, gradient_inequality_along
from kxexplain.learning.objectives import flooded, input_penalty, parameter_penalty
from kxexplain.learning.scheduler import GradientSchedule
from kxexplain.learning.schedules import Schedule
from kxexplain.learning.svm import compare_svm
from kxexplain.learning.trainer import fit, train
from kxexplain.search import GradientIndex, Neighbors
from kxexplain.trajectory import Objective, Recorder, Trajectory, import_checkpoints, record

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 - grouped by what they are for
    # record
    "train", "fit", "record", "import_checkpoints", "Recorder", "Trajectory",
    # how to learn: the rate, and what is minimised
    "Schedule", "GradientSchedule", "Objective", "flooded", "input_penalty", "parameter_penalty",
    # what theory says of a run, and how it went
    "bounds", "Bounds", "minimize", "plot_bounds", "plot_training",
    "gradient_inequality", "gradient_inequality_along", "GradientInequality",
    # explain
    "explain", "Explanation", "Ranking", "Timeline",
    # kernels
    "tangent_kernel", "path_kernel",
    # search and compare
    "GradientIndex", "Neighbors", "compare_svm", "Comparison",
    # data
    "datasets",
    # errors and the warning
    "KxError", "ArgumentError", "DatasetError", "IndexFileError", "MissingExtraError", "ModelError", "ReplayError",
    "TargetError", "TrainingError", "TrajectoryError", "UnattributedWarning", "IncompleteWarning",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The pictures, which take matplotlib, are loaded when they are asked for."""
    if name in ("plot_bounds", "plot_training"):
        from kxexplain import plots

        return getattr(plots, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
