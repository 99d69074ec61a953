r"""A model that stays as it is, seen as features: φ_c(x) = ∇_θ f_c(x), and vectors in the space of its parameters.

The linearised model is f(x) + ⟨φ(x), δ⟩. In kernel form δ = Σ_j φ(x_j) a_j, so ⟨φ(x), δ⟩ = Σ_j K(x, x_j) a_j.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError, KxError, ModelError
from kxexplain.gradients import Factors, Outer, dot, layout_of, output_gradients, trainable
from kxexplain.gradients.factors import Factor, concatenate, wide
from kxexplain.gradients.products import gram
from kxexplain.gradients.uses import Layout
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory.batches import call, copied, count, leaves, outputs_2d, take
from kxexplain.trajectory.forward import private_copy

BATCH = 256
"""Examples differentiated, or pushed forward, at once."""


class TangentFeatures:
    """Outputs, output gradients and their inner products of a private copy of a model, in evaluation mode.

    Args:
        model: any module with trainable parameters; not changed.
        parameters: names of those to take (or what their names begin with); all trainable ones if ``None``.

    Raises:
        ModelError: nothing to differentiate by.
        ArgumentError: a name that fits no trainable parameter.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[str] | None = None) -> None:
        self.model = private_copy(model).eval()
        chosen = _chosen(list(trainable(self.model)), parameters)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in chosen)
        if not trainable(self.model):
            raise ModelError("the model has no trainable parameters: there is nothing to learn with")
        self.shape: tuple[int, ...] = ()  # of one example's outputs, as the model gave them last
        self._layout: Layout | None = None
        self._twice: bool | None = None  # whether the model's operations can be differentiated twice, once known

    @property
    def names(self) -> list[str]:
        """The parameters taken."""
        return list(trainable(self.model))

    @property
    def size(self) -> int:
        """p, how many numbers those are."""
        return sum(p.numel() for p in trainable(self.model).values())

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device that sums are kept in."""
        first = next(iter(trainable(self.model).values()))
        return torch.zeros((), dtype=wide(first), device=first.device)

    def digest(self) -> str:
        """A checksum of every parameter and buffer."""
        found = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def checked(self, inputs: Inputs) -> Tensor:
        """Outputs [n, C] of inputs that were not tried before.

        Raises:
            DatasetError: none, NaN among them, or of a kind that the model cannot take.
        """
        if count(inputs) == 0:
            raise DatasetError("there are no examples; give at least one")
        for path, leaf in leaves(inputs):
            if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise DatasetError(f"the inputs{path} hold NaN or infinite values; clean them first")
        given = ", ".join(f"{path.lstrip('.')} {x.dtype} {tuple(x.shape)}".strip() for path, x in leaves(inputs))
        try:
            found = self.outputs(inputs)
        except (KxError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the model's own code raises
            raise DatasetError(
                f"the model cannot take inputs {given} ({type(error).__name__}: {error}); expected a batch like the "
                "training examples'; a single input is x[None]"
            ) from error
        if len(found) != count(inputs):
            raise DatasetError(
                f"the model gave {len(found)} rows for {count(inputs)} inputs ({given}); expected a row for each: is "
                "the first axis the examples'?"
            )
        return found

    def outputs(self, inputs: Inputs) -> Float[Tensor, "n c"]:
        """The model's own outputs."""
        with torch.no_grad():
            return torch.cat([self._called(part) for part in portions(inputs)])

    def _called(self, inputs: Inputs) -> Tensor:
        raw = call(self.model, copied(inputs))
        self.shape = tuple(raw.shape[1:])
        return outputs_2d(raw)

    def factors(self, inputs: Inputs) -> Factors:
        """Every example's output gradients, in factored form."""
        if self._layout is None:
            self._layout = layout_of(self.model, inputs, trainable(self.model))
        return concatenate([output_gradients(self.model, part, self._layout)[1] for part in portions(inputs)])

    def gram(self, left: Factors, right: Factors | None = None) -> Float[Tensor, "p k"]:
        """K between two sets of examples, an example's outputs next to each other: [n·C, m·C].

        Of one set with itself it is exactly symmetric: what is summed in another order rounds in another way.
        """
        block = gram(left, left if right is None else right, dtype=self.like.dtype)
        n, c, m, k = block.shape
        matrix = block.reshape(n * c, m * k)
        return matrix if right is not None else (matrix + matrix.T) / 2

    def linearised(self, inputs: Inputs, vector: Tensors) -> Float[Tensor, "n c"]:
        """f(x) + ⟨φ(x), δ⟩ by one forward and two backward passes, whatever C.

        The derivative of vᵀ (∂f/∂θ) δ in v is (∂f/∂θ) δ. A model whose operations have no second derivative takes a
        backward pass per output.
        """
        return torch.cat([self._linearised(part, vector) for part in portions(inputs)])

    def _linearised(self, inputs: Inputs, vector: Tensors) -> Tensor:
        if not any(bool(v.any()) for v in vector.values()):
            return self.outputs(inputs)
        if self._twice is None:
            self._twice = self._agrees(take(inputs, slice(0, 4)), vector)
        return self._by_two_passes(inputs, vector) if self._twice else self._by_outputs(inputs, vector)

    def _by_outputs(self, inputs: Inputs, vector: Tensors) -> Tensor:
        outputs = self.outputs(inputs)
        return outputs + self.along(self.factors(inputs), vector).to(outputs)

    def _agrees(self, inputs: Inputs, vector: Tensors) -> bool:
        """Whether two passes give what a pass per output gives.

        Torch raises where a derivative is missing, or leaves it out without a word (``once_differentiable``).
        """
        expected, outputs = self._by_outputs(inputs, vector), self.outputs(inputs)
        try:
            found = self._by_two_passes(inputs, vector)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        close = torch.finfo(found.dtype).eps ** 0.5 * float((expected - outputs).abs().max() + outputs.abs().max())
        return bool((found - expected).abs().max() <= close)

    def _by_two_passes(self, inputs: Inputs, vector: Tensors) -> Tensor:
        paired = self._paired(vector)
        with torch.enable_grad():
            outputs = self._called(inputs)
            probe = torch.zeros_like(outputs, requires_grad=True)
            found = torch.autograd.grad(outputs, [p for p, _ in paired], probe, create_graph=True, allow_unused=True)
            used = [(g, v.to(p)) for g, (p, v) in zip(found, paired, strict=True) if g is not None and g.requires_grad]
            if not used:
                return outputs.detach()
            gradients, along = zip(*used, strict=True)
            moved = torch.autograd.grad(gradients, probe, along)[0]
        return (outputs + moved).detach()

    def _paired(self, vector: Tensors) -> list[tuple[Tensor, Tensor]]:
        own = trainable(self.model)
        return [(own[name], value.view_as(own[name])) for name, value in vector.items()]

    def nothing(self) -> Tensors:
        """δ = 0."""
        return {name: torch.zeros_like(p, dtype=self.like.dtype) for name, p in self._zeros()}

    def _zeros(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for name, p in trainable(self.model).items()]

    def pull(self, factors: Factors, a: Float[Tensor, "n c"]) -> Tensors:
        """Σ_j φ(x_j) a_j as one vector, in the wide dtype; one matrix product a layer."""
        vector = self.nothing()
        for f in _widened(factors, a):
            weighted: Factor
            if isinstance(f, Outer):
                weighted = replace(f, g=(f.g * a[:, :, None, None]).sum(1, keepdim=True))
            else:
                weighted = replace(f, values=(f.values * a[:, :, None]).sum(1, keepdim=True))
            for name, total in weighted.total().items():
                vector[name] += total.view_as(vector[name])
        return vector

    def along(self, factors: Factors, vector: Tensors) -> Float[Tensor, "n c"]:
        """⟨φ(x_j), δ⟩ of examples whose gradients are at hand, in the wide dtype."""
        return dot(_widened(factors, self.like), vector)

    def written(self, factors: Factors) -> Float[Tensor, "m p"]:
        """The gradients as rows, an example's outputs next to each other: [n·C, p]."""
        n, c = factors[0].rows, factors[0].columns
        rows = {name: self.like.new_zeros(n, c, p.numel()) for name, p in self._zeros()}
        for f in factors:
            for part in f.dense():
                rows[part.weight] += part.values
        return torch.cat([rows[name] for name in rows], 2).flatten(0, 1)

    def shaped(self, flat: Float[Tensor, " p"]) -> Tensors:
        """A vector of p numbers by parameter."""
        sizes = [p.numel() for _, p in self._zeros()]
        return {name: part.view(p.shape) for (name, p), part in zip(self._zeros(), flat.split(sizes), strict=True)}


def _widened(factors: Factors, like: Tensor) -> Factors:
    return [
        replace(f, a=f.a.to(like), g=f.g.to(like)) if isinstance(f, Outer) else replace(f, values=f.values.to(like))
        for f in factors
    ]


def portions(inputs: Inputs) -> list[Inputs]:
    """A batch in pieces of at most :data:`BATCH` examples."""
    return [take(inputs, slice(at, at + BATCH)) for at in range(0, count(inputs), BATCH)]


def added(first: Tensors, second: Tensors, sign: float = 1.0) -> Tensors:
    """The sum (or difference) of two vectors."""
    return {name: first[name] + sign * second[name] for name in first}


def grown(model: nn.Module, columns: int, extra: int, bias: float) -> nn.Module:
    """A copy of the model with more outputs: rows of zeros below its last linear layer's, and a constant bias.

    Args:
        model: one that ends in a linear layer of as many outputs as it has.
        columns: how many that are.
        extra: outputs to add.
        bias: their value, on every input, until they have learnt something.

    Raises:
        ModelError: no such layer, or one without a bias.
    """
    model = private_copy(model)
    last = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == columns]
    if not last or last[-1][1].bias is None or type(last[-1][1]) is not nn.Linear:
        raise ModelError(
            f"new classes need a model that ends in an nn.Linear with bias and {columns} outputs; this one does not: "
            "give it outputs to spare when it is built"
        )
    name, old = last[-1]
    new = nn.Linear(old.in_features, columns + extra).to(old.weight)
    with torch.no_grad():
        new.weight.zero_()
        new.bias.fill_(bias)
        new.weight[:columns], new.bias[:columns] = old.weight, old.bias
    for ours, theirs in zip(new.parameters(), old.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    parent, _, own = name.rpartition(".")
    if not name:
        return new.train(model.training)
    setattr(model.get_submodule(parent), own, new.train(old.training))
    return model


def _chosen(names: list[str], wanted: Sequence[str] | None) -> set[str]:
    if wanted is None:
        return set(names)
    fits: Callable[[str, str], bool] = lambda name, start: name == start or name.startswith(f"{start}.")  # noqa: E731
    for start in wanted:
        if not any(fits(name, start) for name in names):
            raise ArgumentError(f"got parameters={list(wanted)!r}: {start!r} fits none of the trainable {names}")
    return {name for name in names if any(fits(name, start) for start in wanted)}
