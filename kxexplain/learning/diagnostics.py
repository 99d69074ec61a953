r"""How fast a network's output changes with its input, against how fast it changes with its parameters.

For layers h^{(k+1)} = φ(W^{(k)} h^{(k)} + b^{(k)}), h^{(1)} = x, and a scalar f of the last one, with δ^{(k)} the
gradient at the layer's linear output, ‖∇_{W,b} f‖² = ‖δ^{(k)}‖² (1 + ‖h^{(k)}‖²), and
∇_x f = (∇_x h^{(k)})ᵀ W^{(k)ᵀ} δ^{(k)} gives ‖∇_x f‖ ≤ ‖∇_x h^{(k)}‖ ‖W^{(k)}‖ ‖δ^{(k)}‖
with spectral norms. Hence, layer by layer,

    ‖∇_x f‖² (1 + ‖h^{(k)}‖²) / (‖W^{(k)}‖² ‖∇_x h^{(k)}‖²) ≤ ‖∇_{W,b} f‖²

and the sum over the layers ≤ ‖∇_θ f‖² = K_θ(x, x): a network that is flat in its parameters is flat in its inputs. One
linear layer with one output has equality. Without a bias the 1 is missing. (Compare Ma & Ying 2021,
arXiv 2105.13462.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, ModelError
from kxexplain.trajectory import Trajectory, outputs_2d
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.states import load_model

PASSED = (nn.Identity, nn.Flatten, nn.Dropout, nn.AlphaDropout)
"""Modules that an evaluated network passes through unchanged."""


@dataclass(frozen=True)
class GradientInequality:
    """Both sides, per example and layer.

    Attributes:
        left: ‖∇_x f‖² (1 + ‖h‖²) / (‖W‖² ‖∇_x h‖²), [query, layer]; 0 where the input does not reach the layer.
        right: ‖∇_{W,b} f‖², [query, layer].
        layers: the linear layers' names.
    """

    left: Float[Tensor, "query layer"]
    right: Float[Tensor, "query layer"]
    layers: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every layer of every example keeps to it, but for rounding."""
        slack = 100 * torch.finfo(self.left.dtype).eps
        return bool((self.left <= self.right * (1 + slack) + slack * self.right.max()).all())

    @property
    def ratio(self) -> Float[Tensor, " query"]:
        """Σ left / Σ right, at most 1: how close the inequality is to equality."""
        return self.left.sum(1) / self.right.sum(1)


def gradient_inequality(
    model: nn.Module, inputs: Float[Tensor, "query ..."], output: int | Callable[[Tensor], Tensor] = 0
) -> GradientInequality:
    """Both sides of the inequality for an MLP as it stands, evaluated.

    Args:
        model: an ``nn.Sequential`` (nested ones too) of ``nn.Linear`` and elementwise activations.
        inputs: [query, …], floating-point.
        output: f, an output's number or a function from outputs [query, c] to [query].

    Raises:
        ModelError: another architecture.
        ArgumentError: an output that does not exist.

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> found = gradient_inequality(nn.Linear(3, 1).double(), torch.randn(2, 3, dtype=torch.float64))
    >>> bool((found.ratio - 1).abs().max() < 1e-12)
    True
    """
    network = private_copy(model).eval()
    layers = _layers(network)
    x = inputs.detach().clone().requires_grad_()
    h, jacobian = x.flatten(1), torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    met: list[tuple[str, nn.Linear, Tensor, Tensor, Tensor]] = []  # h, ∇_x h, and the linear layer's output
    with torch.enable_grad():
        for name, module in layers:
            if isinstance(module, nn.Linear):
                below, before = h, jacobian
                h = module(below)
                jacobian = module.weight.detach() @ jacobian
                met.append((name, module, below.detach(), before, h))
            else:
                above = module(h)
                slope = torch.autograd.grad(above.sum(), h, retain_graph=True)[0]
                _check_elementwise(name, module, h, above)
                h, jacobian = above, slope[:, :, None] * jacobian
        wanted = [z for *_, z in met]
        *deltas, at_input = torch.autograd.grad(_chosen(outputs_2d(h), output).sum(), [*wanted, x])
    size = at_input.flatten(1).square().sum(1)
    left, right = [], []
    for (_, module, below, before, _), delta in zip(met, deltas, strict=True):
        scale = below.square().sum(1) + (module.bias is not None)
        steepest = torch.linalg.matrix_norm(module.weight.detach(), 2) * torch.linalg.matrix_norm(before, 2)
        left.append(torch.where(steepest > 0, size * scale / steepest.square().clamp_min(_tiny(size)), 0.0))
        right.append(delta.square().sum(1) * scale)
    return GradientInequality(torch.stack(left, 1), torch.stack(right, 1), tuple(name for name, *_ in met))


def gradient_inequality_along(
    trajectory: Trajectory,
    model: nn.Module,
    inputs: Float[Tensor, "query ..."],
    output: int | Callable[[Tensor], Tensor] = 0,
) -> dict[int, GradientInequality]:
    """The inequality at every recorded state, by its step; ``model`` lends its code and is not changed."""
    Trajectory.required(trajectory).check_model(model)
    network, found = private_copy(model), {}
    for record in trajectory.states:
        load_model(trajectory.state(record.step), network)
        found[record.step] = gradient_inequality(network, inputs, output)
    return found


def _layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that values pass, in order."""
    if isinstance(network, nn.Linear):
        return [("0", network)]
    flat = [(n, m) for n, m in network.named_modules() if not isinstance(m, (nn.Sequential, *PASSED))]
    known = isinstance(network, nn.Sequential) and all(not list(m.children()) for _, m in flat)
    strange = [type(m).__name__ for _, m in flat if not isinstance(m, nn.Linear) and list(m.parameters())]
    if not known or strange or not any(isinstance(m, nn.Linear) for _, m in flat):
        raise ModelError(
            f"the inequality is for an nn.Sequential of nn.Linear and elementwise activations, got a "
            f"{type(network).__name__}{f' with {strange[0]}' if strange else ''}"
        )
    if len({id(m) for _, m in flat}) != len(flat) or len(list(network.named_modules(remove_duplicate=False))) != len(
        list(network.named_modules())
    ):
        raise ModelError(
            "a module is used twice in this nn.Sequential; the inequality is for layers of their own weights"
        )
    return flat


def _check_elementwise(name: str, module: nn.Module, before: Tensor, after: Tensor) -> None:
    """``ModelError`` for a softmax and the like: one feature must depend on itself alone."""
    changed = before.detach().clone()
    changed[:, 0] += 1.0
    with torch.no_grad():
        moved = module(changed)
    if after.shape != before.shape or not torch.equal(moved[:, 1:], after.detach()[:, 1:]):
        raise ModelError(f"{type(module).__name__} (module {name!r}) is not elementwise; the inequality needs that")


def _chosen(outputs: Tensor, output: int | Callable[[Tensor], Tensor]) -> Tensor:
    if callable(output):
        return output(outputs)
    if not -outputs.shape[1] <= output < outputs.shape[1]:
        raise ArgumentError(f"output {output} was asked for, but the model has {outputs.shape[1]}")
    return outputs[:, output]


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny


__all__ = ["GradientInequality", "gradient_inequality", "gradient_inequality_along"]
