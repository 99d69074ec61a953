"""Per-example gradients from captured factors against a loop with one backward pass per example (law 3)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kxexplain.gradients import Factors, StepGradients, layout_of, output_gradients, trainable
from kxexplain.gradients.capture import Capture
from kxexplain.gradients.factors import Dense
from kxexplain.trajectory.batches import call, count, outputs_2d, take
from kxexplain.trajectory.forward import forward, gradients
from kxexplain.trajectory.losses import resolve
from tests import cases, reference
from tests.cases import CASES, Case, tokens, vectors
from tests.laws import FACTORED, assert_close


def written_out(factors: Factors, model: nn.Module) -> Tensor:
    """Factors as a dense Jacobian, [n, c, p], in the order of the model's parameters."""
    parts: dict[str, Tensor] = {}
    for factor in factors:
        for dense in factor.dense():
            parts[dense.weight] = parts.get(dense.weight, 0) + dense.values
    shape = next(iter(parts.values())).shape[:2]
    return torch.cat(
        [parts.get(name, p.new_zeros(*shape, p.numel())).detach() for name, p in reference.parameters(model).items()],
        -1,
    )


@pytest.mark.parametrize("name", list(CASES))
def test_output_gradients_equal_the_loop(name: str, dtype: torch.dtype) -> None:
    problem = CASES[name].build(dtype)
    model, inputs = problem.model.eval(), problem.inputs
    layout = layout_of(model, inputs, trainable(model))
    values, factors = output_gradients(model, inputs, layout)
    assert_close(values, outputs_2d(call(model, inputs)).detach(), FACTORED[dtype])
    assert_close(written_out(factors, model), reference.jacobian(model, inputs), FACTORED[dtype])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("name", ["encoder", "encoder-time-first", "causal-all", "twice", "conv1d", "two-inputs"])
def test_batches_of_any_size(name: str, rows: int) -> None:
    """The layout is measured once, on other sizes; sizes equal to other axes' must not confuse it."""
    problem = CASES["attention-causal" if name == "causal-all" else name].build(queries=6)
    model = problem.model.eval()
    layout = layout_of(model, take(problem.inputs, slice(0, 1)), trainable(model))
    inputs = take(problem.inputs, slice(0, rows))
    _, factors = output_gradients(model, inputs, layout)
    assert_close(written_out(factors, model), reference.jacobian(model, inputs), 1e-12)


@pytest.mark.parametrize("name", [name for name in cases.names(without="batch-norm") if name != "dropout"])
def test_step_gradients_equal_the_loop(name: str, dtype: torch.dtype) -> None:
    """The examples' shares of a training step's gradient, and the pulls on the outputs."""
    problem = CASES[name].build(dtype)
    model = problem.model.train()
    inputs, targets = problem.examples
    layout = layout_of(model, inputs, trainable(model))
    watch = StepGradients(layout, trainable(model), count(inputs), with_jacobian=True)
    loss = resolve(problem.loss)[1]
    result = forward(model, inputs, targets, loss=loss, reduction="mean", around=watch.forward(inputs))
    edges = watch.edges(*result[:3])
    wanted = list(trainable(model).values())
    found, at_edges = gradients(result.total, wanted, edges)
    watch.collect(at_edges)
    n = count(inputs)
    each = reference.loss_gradients(model, inputs, targets, problem.loss) / n
    mine = written_out(watch.factors, model)
    assert_close(mine[:, 0], each, FACTORED[dtype])
    assert_close(mine.sum((0, 1)), reference.flat(found, wanted), FACTORED[dtype])
    named = {k: g for k, g in zip(trainable(model), found, strict=True) if g is not None}
    accounted = watch.accounted(named)
    assert_close(reference.flat([accounted.get(k) for k in trainable(model)], wanted), each.sum(0), FACTORED[dtype])
    assert watch.jacobian is not None
    dense = reference.jacobian(model, inputs)
    assert_close(written_out(watch.jacobian, model), dense, FACTORED[dtype])
    assert_close(torch.einsum("nc,ncp->np", watch.pull, dense), each, FACTORED[dtype])


@pytest.mark.parametrize("name", cases.names(kind="batch-norm"))
def test_step_gradients_under_batch_norm_add_up(name: str, dtype: torch.dtype) -> None:
    """Batch statistics tie the examples together: their shares still sum to the batch gradient."""
    problem = CASES[name].build(dtype)
    model = problem.model.train()
    inputs, targets = problem.examples
    layout = layout_of(model, inputs, trainable(model))
    watch = StepGradients(layout, trainable(model), count(inputs))
    loss = resolve(problem.loss)[1]
    result = forward(model, inputs, targets, loss=loss, reduction="mean", around=watch.forward(inputs))
    edges = watch.edges(*result[:3])
    wanted = list(trainable(model).values())
    found, at_edges = gradients(result.total, wanted, edges)
    watch.collect(at_edges)
    assert_close(written_out(watch.factors, model).sum((0, 1)), reference.flat(found, wanted), FACTORED[dtype])


class ZeroHead(nn.Module):
    """A readout that starts at zero, as is common: no gradient reaches the layers below at first."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = cases.Encoder(batch_first=False)
        nn.init.zeros_(self.encoder.head.weight)

    def forward(self, words: Tensor) -> Tensor:
        return self.encoder(words)


class FlattenedTime(nn.Module):
    """Rows of time × example, the time outermost, of which only some reach the output."""

    def __init__(self, at: int, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.head, self.at, self.activation = nn.Linear(6, 5), nn.Linear(5, 3), at, activation

    def forward(self, x: Tensor) -> Tensor:
        n, time, _ = x.shape
        h = self.activation(self.layer(x.transpose(0, 1).reshape(time * n, 6)))
        return self.head(h.view(time, n, 5)[self.at])


@pytest.mark.parametrize("at", [0, 1, -1])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_which_rows_are_whose(at: int, activation: nn.Module) -> None:
    problem = Case("flattened", lambda: FlattenedTime(at, activation), cases.sequences).build()
    model, inputs = problem.model.eval(), problem.inputs
    _, factors = output_gradients(model, inputs, layout_of(model, inputs, trainable(model)))
    assert_close(written_out(factors, model), reference.jacobian(model, inputs), 1e-12)


def test_the_layout_survives_a_readout_of_zero() -> None:
    """Training measures the layout at the initial weights; it must hold after them."""
    problem = Case("zero-head", ZeroHead, tokens).build()
    model, inputs = problem.model.eval(), problem.inputs
    layout = layout_of(model, inputs, trainable(model))
    nn.init.normal_(model.encoder.head.weight)
    _, factors = output_gradients(model, inputs, layout)
    assert_close(written_out(factors, model), reference.jacobian(model, inputs), 1e-12)


class PaddedPositions(nn.Module):
    """A look-up of fixed positions in a table with a padding row, which takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.head = nn.Embedding(6, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.place(torch.arange(2))[0] * self.place(torch.arange(2))[1]))


class PaddedWords(nn.Module):
    """An embedding with a padding row that occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 6, padding_idx=3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).mean(1))


class Slices(nn.Module):
    """Parameters cut up and rearranged before use."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Parameter(torch.randn(9, 8) / 3)
        self.shift = nn.Parameter(torch.randn(1, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.all[:6, :4], self.all.t()[4:, :6]
        up, down = self.all.split([4, 4], 1)
        h = (x @ left).unsqueeze(-1) + self.shift - self.shift[:, [1, 0, 3, 2]] * 0.5
        h = h.squeeze(-1) * self.all.view(-1)[5:9] + F.linear(x, right)
        return torch.tanh(h) @ up[:4, :3] + (1 - h) @ down[[1, 3, 0, 0]][:, :3] + self.all[7, 7]


class Broadcast(nn.Module):
    """Gains and shifts of every shape, on either side, reflected and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 6))
        self.c, self.d = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(1))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a * x - self.b
        h = self.c - h
        h = h + self.d * torch.ones_like(h)
        h = torch.tanh(h).clone()
        h += self.a
        h *= self.b
        h -= self.c
        return self.head(torch.sub(h, self.a, alpha=2) + torch.add(self.d, h))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(PaddedPositions, vectors), (PaddedWords, tokens), (Slices, vectors), (Broadcast, vectors)],
)
def test_parameters_used_outside_layers(model: type[nn.Module], inputs) -> None:
    problem = Case(model.__name__, model, inputs).build()
    model, x = problem.model.eval(), problem.inputs
    _, factors = output_gradients(model, x, layout_of(model, x, trainable(model)))
    assert_close(written_out(factors, model), reference.jacobian(model, x), 1e-12)


class Packed(nn.Module):
    """A packed sequence: its rows are sorted by time and length."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, :, 0] > 0).sum(1).clamp_min(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.net(packed)[1][-1])


def test_what_falls_back_is_exact() -> None:
    """A use without a contact, as the README tells: one backward pass per example, and the same gradients."""
    problem = Case("packed", Packed, cases.sequences).build()
    model, x = problem.model.eval(), problem.inputs
    layout = layout_of(model, x, trainable(model))
    capture = Capture(trainable(model), layout, count(x))
    with capture.around():
        call(model, x)
    _, factors = output_gradients(model, x, layout)
    assert_close(written_out(factors, model), reference.jacobian(model, x), 1e-12)
    assert capture.loose == {name for name in trainable(model) if name.startswith("net")}


def test_recurrent_projections() -> None:
    problem = Case(
        "projected", lambda: cases.Stacked(nn.LSTM, proj_size=3, bidirectional=True), cases.sequences
    ).build()
    model, x = problem.model, problem.inputs
    layout = layout_of(model, x, trainable(model))
    _, factors = output_gradients(model, x, layout)
    assert_close(written_out(factors, model), reference.jacobian(model, x), 1e-12)
    assert not layout.loose


def test_dropout_between_recurrent_layers_falls_back() -> None:
    """In training its draws are the fused call's own; at rest it is like any other."""
    model = cases.Stacked(nn.LSTM, num_layers=2, dropout=0.5).double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    for training in (True, False):
        capture = Capture(trainable(model), layout_of(model.train(training), x, trainable(model)), 4)
        with capture.around():
            call(model, x)
        assert (capture.loose == set()) == (not training)


def test_frozen_parameters_are_left_out() -> None:
    problem = CASES["mlp-tanh"].build()
    model = problem.model.eval()
    model[2].weight.requires_grad_(False)
    _, factors = output_gradients(model, problem.inputs, layout_of(model, problem.inputs, trainable(model)))
    names = {part.weight for factor in factors for part in factor.dense()}
    assert names == set(trainable(model))
    assert_close(written_out(factors, model), reference.jacobian(model, problem.inputs), 1e-12)


def test_select_differentiates_what_it_returns() -> None:
    problem = CASES["mlp-tanh"].build()
    model, x = problem.model, problem.inputs
    layout = layout_of(model, x, trainable(model))
    select = lambda outputs: outputs.log_softmax(1)[:, [2, 0]]  # noqa: E731
    values, factors = output_gradients(model, x, layout, select)
    assert values.shape == (4, 2)
    assert_close(written_out(factors, model), reference.jacobian(model, x, select), 1e-12)


def test_what_cancels_is_accounted_as_the_shares_are() -> None:
    """Of large terms that cancel, autograd's sum leaves noise of its own; the accounts hold the shares' sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    inputs, targets = torch.randn(64, 64) * 100, torch.zeros(64)
    watch = StepGradients(layout_of(model, inputs, trainable(model)), trainable(model), 64)
    result = forward(
        model, inputs, targets, loss=lambda f, _: (1e4 * f + f.square()).sum(1), reduction="sum",
        around=watch.forward(inputs),
    )  # fmt: skip
    (weight, *_), at_edges = gradients(result.total, [model[1].weight], watch.edges(*result[:3]))
    watch.collect(at_edges)
    (shares,) = (f.values for f in watch.factors if isinstance(f, Dense) and f.weight == "1.weight")
    assert weight is not None
    exact = shares.double().sum((0, 1)).view_as(weight)
    accounted = watch.accounted({"1.weight": weight})["1.weight"]
    assert accounted.dtype == weight.dtype
    assert float((accounted - exact).abs().max()) <= 1e-7 * float(exact.abs().max())
    assert float((weight - exact).abs().max()) > 10 * float((accounted - exact).abs().max())
