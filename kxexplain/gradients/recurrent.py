r"""LSTM, GRU and RNN, unrolled: torch computes each in one call, whose weights meet data at every time inside it.

The unrolled form serves twice. Between two states (:mod:`kxexplain.gradients.two_point`) each of its operations has an
exact rule. At one state the call is left as it is, so that replay repeats training to the last bit; the gradient at
its output goes back through the unrolled form to what came out of every product, which gives outer products by time.

Formulas: the documentation of ``torch.nn.LSTM``, ``GRU`` and ``RNN``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kxexplain.gradients.contacts import Made, Sources, assemble_linear, source_of
from kxexplain.gradients.factors import Factors
from kxexplain.gradients.rules import secant
from kxexplain.gradients.sources import Source
from kxexplain.gradients.uses import Axis, Use

Product = Callable[[Tensor, Any, Any], Tensor]
"""``F.linear``, or a version of it that notes what it was applied to."""

CELLS = tuple(cell + kind for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") for kind in ("", "_cell"))
"""What torch calls them: a whole sequence, or one time of it."""


@dataclass(frozen=True)
class Call:
    """One call, its arguments by name: inputs [time, n, d] (or time second), states [layer·direction, n, h]."""

    cell: str
    x: Any
    states: tuple[Any, ...]
    weights: list[Any]
    biased: bool
    layers: int = 1
    directions: int = 1
    batch_first: bool = False
    single: bool = False

    @property
    def per_layer(self) -> int:
        """Tensors that a layer has in one direction: two matrices, their biases, and a projection if it has one."""
        return len(self.weights) // (self.layers * self.directions)


def read(name: str, args: Sequence[Any]) -> Call | None:
    """A call's arguments; ``None`` for what is not unrolled (packed sequences, dropout drawn between layers)."""
    if name.endswith("_cell"):
        x, states, *weights = args
        biased = len(weights) == 4 and weights[2] is not None
        held = tuple(states) if isinstance(states, (tuple, list)) else (states,)
        return Call(name.removesuffix("_cell"), x, held, weights[: 4 if biased else 2], biased, single=True)
    if len(args) != 9 or not isinstance(args[3], bool):  # of a packed sequence the fourth holds the weights
        return None
    x, states, weights, biased, layers, dropout, training, both, batch_first = args
    if training and dropout > 0 and layers > 1:
        return None
    held = tuple(states) if isinstance(states, (tuple, list)) else (states,)
    return Call(name, x, held, list(weights), biased, layers, 1 + bool(both), bool(batch_first))


def unrolled(call: Call, product: Product = F.linear) -> tuple[Any, ...]:
    """What the call returns, computed time by time."""
    if call.single:
        x, states = call.x.unsqueeze(0), tuple(s.unsqueeze(0) for s in call.states)
        _, *last = unrolled(replace(call, x=x, states=states, single=False), product)
        return tuple(s.squeeze(0) for s in last)
    x = call.x.transpose(0, 1) if call.batch_first else call.x
    last = []
    for layer in range(call.layers):
        found = []
        for direction in range(call.directions):
            at = layer * call.directions + direction
            weights = call.weights[at * call.per_layer : (at + 1) * call.per_layer]
            states = tuple(s[at] for s in call.states)
            outputs, final = _pass(call, x, states, weights, bool(direction), product)
            found.append(outputs)
            last.append(final)
        x = found[0] if len(found) == 1 else torch.cat(found, -1)
    output = x.transpose(0, 1) if call.batch_first else x
    return (output, *(torch.stack(list(each)) for each in zip(*last, strict=True)))


def _pass(
    call: Call, x: Any, states: tuple[Any, ...], weights: list[Any], backward: bool, product: Product
) -> tuple[Any, tuple[Any, ...]]:
    """One layer in one direction: outputs [time, n, h] and the last states."""
    w_in, w_hidden, *rest = weights
    b_in, b_hidden = (rest.pop(0), rest.pop(0)) if call.biased else (None, None)
    entering, outputs = product(x, w_in, b_in).unbind(0), []
    for inputs in reversed(entering) if backward else entering:
        states = _step(call.cell, inputs, product(states[0], w_hidden, b_hidden), states)
        if rest:
            states = (product(states[0], rest[0], None), *states[1:])
        outputs.append(states[0])
    return torch.stack(outputs[::-1] if backward else outputs), states


def _step(cell: str, inputs: Any, hidden: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
    """The next states from the inputs' and the hidden state's products."""
    if cell == "lstm":
        i, f, g, o = (inputs + hidden).chunk(4, -1)
        memory = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(memory), memory
    if cell == "gru":
        (r, z, n), (r_hidden, z_hidden, n_hidden) = inputs.chunk(3, -1), hidden.chunk(3, -1)
        new = torch.tanh(n + torch.sigmoid(r + r_hidden) * n_hidden)
        return (new + torch.sigmoid(z + z_hidden) * (states[0] - new),)
    return (torch.tanh(inputs + hidden) if cell == "rnn_tanh" else torch.relu(inputs + hidden),)


def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call between two points."""
    call = read(func.__name__, args)
    if call is None:
        return secant(func, args, kwargs)
    found = unrolled(call)
    return found if len(found) > 1 else found[0]


def contact(name: str) -> Callable[..., Made]:
    """What to keep of a call at one of its outputs; ``leaf`` says at which."""

    def made(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis, leaf: int = 0) -> Made:
        call = read(name, args)
        if call is None or kwargs or source_of(sources, call.x) is not None:
            return None
        if any(source_of(sources, state) is not None for state in call.states):
            return None
        expected = 0 if call.single or (leaf == 0 and call.batch_first) else 1
        if axis.axis != expected:
            return None
        used = {str(at): source_of(sources, w) for at, w in enumerate(call.weights)}
        return "recurrent", {role: s for role, s in used.items() if s is not None}, {"call": call, "leaf": leaf}

    return made


@dataclass
class _Products:
    """The products of one matrix: what it was applied to, and what came out."""

    weight: int
    bias: int | None
    inputs: list[Tensor]
    outputs: list[Tensor]


def assemble(use: Use, gradients: Tensor) -> Factors:
    """Outer products by time, for every matrix of the call."""
    call: Call = use.held["call"]
    met: dict[int, _Products] = {}
    places = {id(w): at for at, w in enumerate(call.weights)}

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        at = places[id(weight)]
        whole = None if bias is None else bias.detach()
        value = F.linear(x, weight.detach().requires_grad_(), whole)
        entry = met.setdefault(at, _Products(at, None if bias is None else places[id(bias)], [], []))
        entry.inputs.append(x.detach())
        entry.outputs.append(value)
        return value

    still = replace(call, x=call.x.detach(), states=tuple(s.detach() for s in call.states))
    with torch.enable_grad():
        outputs = unrolled(still, product)
    products = [value for entry in met.values() for value in entry.outputs]
    output = outputs[use.held["leaf"]]
    columns = [torch.autograd.grad(output, products, g, retain_graph=True, allow_unused=True) for g in gradients]
    made: Factors = []
    at = 0
    for entry in met.values():
        found = [
            [torch.zeros_like(value) if g is None else g for g, value in zip(column[at:], entry.outputs, strict=False)]
            for column in columns
        ]
        at += len(entry.outputs)
        made += _factors(use, entry, found)
    return made


def _factors(use: Use, entry: _Products, columns: list[list[Tensor]]) -> Factors:
    """Examples first, then times: [n, t, d] and [c, n, t, d]."""
    sources: dict[str, Source] = {}
    for role, place in (("weight", entry.weight), ("bias", entry.bias)):
        if str(place) in use.sources:
            sources[role] = use.sources[str(place)]
    if not sources:
        return []
    a, g = _by_time(entry.inputs), torch.stack([_by_time(column) for column in columns])
    axis = replace(use.axis, axis=0)
    return assemble_linear(Use("linear", sources, use.edge, axis, use.rows, g.shape[1:], {"x": a}), g)


def _by_time(values: list[Tensor]) -> Tensor:
    (first, *others) = values
    return first.transpose(0, 1) if first.dim() == 3 and not others else torch.stack(values, 1)
