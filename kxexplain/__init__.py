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
from kxexplain.learning.additive import AdditiveGuess, additive_guess
from kxexplain.learning.alphas import AlphaVariation, alpha_variation
from kxexplain.learning.bounds import Bounds, bounds, minimize
from kxexplain.learning.comparison import Comparison, KernelRow
from kxexplain.learning.convex import DualForm, dual_coefficients
from kxexplain.learning.diagnostics import GradientInequality, gradient_inequality, gradient_inequality_along
from kxexplain.learning.incremental import IncrementalModel, Merged
from kxexplain.learning.incremental.alternatives import Update, Updates, compare_updates
from kxexplain.learning.kernel_machine import KernelMachine
from kxexplain.learning.objectives import flooded, input_penalty, parameter_penalty
from kxexplain.learning.record import record
from kxexplain.learning.removal import Removal, compare_removal, retrain, subtract
from kxexplain.learning.scheduler import GradientSchedule
from kxexplain.learning.schedules import Schedule
from kxexplain.learning.svm import compare_svm
from kxexplain.learning.trainer import fit, train
from kxexplain.search import GradientIndex, Neighbors, dim_for_recall, self_influence
from kxexplain.trajectory import Objective, Recorder, Trajectory, gradient_norms, import_checkpoints, recover

if TYPE_CHECKING:
    from kxexplain.learning.estimators import PathKernelClassifier, PathKernelRegressor
    from kxexplain.learning.incremental.estimator import IncrementalClassifier
    from kxexplain.learning.network_kernel import NetworkKernel
    from kxexplain.learning.tangent_features import TangentFeatures

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 - grouped by what they are for
    # record
    "train", "fit", "record", "recover", "import_checkpoints", "Recorder", "Trajectory",
    # how to learn: the rate, and what is minimised
    "Schedule", "GradientSchedule", "Objective", "flooded", "input_penalty", "parameter_penalty",
    # what theory says of a run, and how it went
    "bounds", "Bounds", "minimize", "gradient_norms", "plot_bounds", "plot_training",
    "gradient_inequality", "gradient_inequality_along", "GradientInequality",
    # explain
    "explain", "Explanation", "Ranking", "Timeline",
    # kernels
    "tangent_kernel", "path_kernel",
    # search and compare
    "GradientIndex", "Neighbors", "dim_for_recall", "self_influence", "compare_svm", "Comparison", "KernelRow",
    "alpha_variation", "AlphaVariation", "dual_coefficients", "DualForm",
    "additive_guess", "AdditiveGuess",
    # kernel machines, and scikit-learn's side
    "KernelMachine", "NetworkKernel", "TangentFeatures", "PathKernelClassifier", "PathKernelRegressor",
    # learn without retraining
    "IncrementalModel", "IncrementalClassifier", "Merged", "compare_updates", "Update", "Updates",
    "subtract", "retrain", "compare_removal", "Removal",
    # data
    "datasets",
    # errors and the warning
    "KxError", "ArgumentError", "DatasetError", "IndexFileError", "MissingExtraError", "ModelError", "ReplayError",
    "TargetError", "TrainingError", "TrajectoryError", "UnattributedWarning", "IncompleteWarning",
]  # fmt: skip

LATE = {
    "PathKernelClassifier": "kxexplain.learning.estimators",
    "PathKernelRegressor": "kxexplain.learning.estimators",
    "NetworkKernel": "kxexplain.learning.network_kernel",
    "TangentFeatures": "kxexplain.learning.tangent_features",
    "IncrementalClassifier": "kxexplain.learning.incremental.estimator",
    "plot_bounds": "kxexplain.plots",
    "plot_training": "kxexplain.plots",
}
"""What takes scikit-learn or matplotlib, a second to import each: imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(LATE[name]), name)
