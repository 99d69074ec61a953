"""Problems to hold the library to: small models of every kind, each with data, a loss and queries.

A case is a line in :data:`CASES`; a test that crosses the table tests every kind of model. Everything is made
from a seed, in the dtype asked for, and small enough that the table runs in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kxexplain.trajectory.batches import fetch

EXAMPLES, QUERIES, CLASSES = 14, 4, 3


class Pairs(Dataset):
    """(input, target) pairs whose inputs are tuples or dicts."""

    def __init__(self, inputs: list[Any], targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.inputs[index], self.targets[index]


@dataclass
class Problem:
    """One case made: an untrained model, its training data, and what to ask about."""

    model: nn.Module
    data: Dataset
    queries: Dataset
    loss: Any

    @property
    def inputs(self) -> Any:
        """The queries' inputs as a batch."""
        return fetch(self.queries, range(len(self.queries)))[0]  # type: ignore[arg-type]

    @property
    def examples(self) -> tuple[Any, Tensor]:
        """All training examples as a batch."""
        return fetch(self.data, range(len(self.data)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """How to make a problem.

    Attributes:
        model: makes the model; torch's default dtype is the one asked for.
        inputs: makes so many inputs.
        outputs: width of the targets: a number of classes, or 0 for real numbers.
        rate: a learning rate that trains.
        smooth: the model is smooth in its parameters, so that a path integral converges fast.
        kind: groups of cases that tests choose by.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    outputs: int = CLASSES
    loss: Any = "cross_entropy"
    rate: float = 0.1
    smooth: bool = True
    kind: frozenset[str] = field(default_factory=frozenset)
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float64, *, examples: int = EXAMPLES, queries: int = QUERIES) -> Problem:
        """The problem, from the case's seed; neither default dtype nor generator is changed."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                model = self.model()
                data, asked = (self._data(n) for n in (examples, queries))
        finally:
            torch.set_default_dtype(before)
        return Problem(model, data, asked, self.loss)

    def _data(self, count: int) -> Dataset:
        inputs = self.inputs(count)
        targets = torch.randint(self.outputs, (count,)) if self.outputs else torch.randn(count)
        if isinstance(inputs, Tensor):
            return TensorDataset(inputs, targets)
        return Pairs(inputs, targets)


def vectors(count: int) -> Tensor:
    return torch.randn(count, 6)


def images(count: int) -> Tensor:
    return torch.randn(count, 2, 6, 6)


def signals(count: int) -> Tensor:
    return torch.randn(count, 2, 9)


def volumes(count: int) -> Tensor:
    return torch.randn(count, 2, 4, 4, 4)


def tokens(count: int) -> Tensor:
    return torch.randint(1, 7, (count, 5))


def sequences(count: int) -> Tensor:
    return torch.randn(count, 4, 6)


def tuples(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6), torch.randn(4)) for _ in range(count)]


def dicts(count: int) -> list[dict[str, Tensor]]:
    return [{"words": torch.randint(1, 7, (5,)), "extra": torch.randn(3)} for _ in range(count)]


def mlp(activation: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 7), activation(), nn.Linear(7, CLASSES))

    return make


def cnn(pool: Callable[[int], nn.Module], activation: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), activation(), pool(2), nn.Conv2d(4, 3, 3, padding=1), activation(),
            nn.Flatten(), nn.Linear(27, CLASSES),
        )  # fmt: skip

    return make


class Residual(nn.Module):
    """Residual CNN with batch norm, in-place activations included."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.first(x)), inplace=True)
        y = F.relu(self.norms[1](self.convolutions[0](x)), inplace=True)
        y = self.norms[2](self.convolutions[1](y))
        y += x
        return self.head(F.adaptive_avg_pool2d(F.relu(y, inplace=True), 1).flatten(1))


class Encoder(nn.Module):
    """Token and positional embeddings, transformer encoder layers, and a readout."""

    def __init__(
        self,
        *,
        batch_first: bool = True,
        readout: str = "mean",
        norm_first: bool = True,
        mask: bool = False,
        depth: int = 1,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 8), nn.Embedding(5, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                8, 2, 12, dropout=0.0, activation="gelu", batch_first=batch_first, norm_first=norm_first
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)
        self.batch_first, self.readout, self.mask = batch_first, readout, mask

    def forward(self, words: Tensor) -> Tensor:
        h = self.tokens(words) + self.positions(torch.arange(words.shape[1], device=words.device))
        if not self.batch_first:
            h = h.transpose(0, 1)
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if self.mask else None
        for layer in self.layers:
            h = layer(h, src_mask=mask)
        h, time = self.norm(h), 1 if self.batch_first else 0
        if self.readout == "mean":
            return self.head(h.mean(time))
        return self.head(h.select(time, 0 if self.readout == "first" else -1))


class Causal(nn.Module):
    """Causal scaled-dot-product attention with a bias-free projection, learned positions and cls token."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8, padding_idx=0)
        self.start = nn.Parameter(torch.randn(1, 1, 8) * 0.5)
        self.place = nn.Parameter(torch.randn(9, 8) * 0.5)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, words: Tensor) -> Tensor:
        n, length = words.shape
        h = torch.cat([self.start.expand(n, -1, -1), self.words(words)], 1) + self.place[: length + 1]
        q, k, v = (t.view(n, length + 1, 2, 4).transpose(1, 2) for t in self.qkv(self.norms[0](h)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, -1, 8)
        h = h + self.gain * self.out(mixed)
        return self.norms[1](h)[:, -1, :CLASSES] * 2.0


class Masked(nn.Module):
    """Hand-written attention that masks with −∞, and nn.MultiheadAttention asked for its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        h = self.words(words)
        hidden = torch.ones(words.shape[1], words.shape[1], dtype=torch.bool).triu(1)
        scores = (self.q(h) @ self.k(h).transpose(1, 2)) / 8**0.5
        h = h + torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ self.v(h)
        mixed, weights = self.attention(h, h, h, attn_mask=hidden, need_weights=True)
        return self.head((h + mixed).mean(1)) + weights.mean((1, 2))[:, None]


class TiedEmbedding(nn.Module):
    """The embedding table is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 7)
        self.out.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.words(words))).mean(1))


class Twice(nn.Module):
    """A layer applied twice, and again with other functions of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return self.head(x) + F.linear(x, self.layer.weight)[:, :CLASSES]


class Transposed(nn.Module):
    """X @ W, x @ W.T and F.linear of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6) / 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.w) @ self.w.T + F.linear(x, self.w))


class Convolutions(nn.Module):
    """Grouped, strided, dilated and padded convolutions in one to three dimensions."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.layers = nn.Sequential(
            conv(2, 4, 3, stride=2, padding=2, groups=2), nn.Tanh(), conv(4, 4, 2, dilation=2, padding=1), nn.Tanh(),
            conv(4, 4, 3, padding="same", groups=4), nn.Tanh(), conv(4, 3, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(2).sum(2)


class Normed(nn.Module):
    """A convolution under one of the norms."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), norm(), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


class Between(nn.Module):
    """Two linear layers with anything between them."""

    def __init__(self, middle: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.first, self.second, self.middle = nn.Linear(6, 6), nn.Linear(width, CLASSES), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


class Softplus2(torch.autograd.Function):
    """A custom function made of torch operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.log1p(torch.exp(2 * x)) / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * torch.sigmoid(2 * x)


class ArctanByNumpy(torch.autograd.Function):
    """A custom function whose forward leaves torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        import numpy as np

        ctx.save_for_backward(x)
        return torch.from_numpy(np.arctan(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient / (1 + x * x)


class Branching(nn.Module):
    """Chooses its path by the sign of a parameter, which training turns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.gate = nn.Parameter(torch.tensor([-0.02]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.tanh(x) if self.gate.sum() > 0 else torch.sin(x)
        return self.second(x) * (2.0 - self.gate)


class Argmax(nn.Module):
    """Adds the row of a table that an argmax picks, and switches elements by a comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(6, 6), nn.Parameter(torch.randn(6, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        picked = self.table[h.argmax(1)]
        return torch.where(h > 0.1, h, 0.3 * h) @ self.table + picked


class IntoPlain(nn.Module):
    """Writes what depends on the parameters into tensors that did not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden, output = x.new_zeros(len(x), 5), x.new_ones(len(x), CLASSES)
        hidden.copy_(torch.tanh(self.first(x)))
        output += self.second(hidden)
        return output


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 4, batch_first=batch_first), nn.Linear(4, CLASSES)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.head(self.lstm(x)[0][:, -1])
        return self.head(self.lstm(x.transpose(0, 1))[0][-1])


class TimeMaximum(nn.Module):
    """Time first, then the largest over time: an unknown operation whose first axis is not the examples'."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.transpose(0, 1)).amax(0))


class TimeSort(nn.Module):
    """An unknown operation on [time, examples, features] with as many times as queries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cumprod(torch.tanh(self.first(x.transpose(0, 1))) + 1.2, 2)
        return self.second(h.sum(0))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair = nn.Linear(6, 4), nn.Bilinear(4, 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(torch.tanh(self.first(x)), x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(left)) * torch.sigmoid(self.right(right)))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.extra = nn.Embedding(7, 5), nn.Linear(3, 5)
        self.bag, self.head = nn.EmbeddingBag(7, 5, mode="mean"), nn.Linear(5, CLASSES)

    def forward(self, words: Tensor, extra: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(words).mean(1) + self.extra(extra)) + self.bag(words))


class Scalar(nn.Module):
    """Regression whose output has no output axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.scale = mlp(nn.Tanh)(), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).sum(1) * self.scale + self.scale


class Calls(nn.Module):
    """Operations called in unusual but legal ways: by keyword, reflected, through methods."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.slope = nn.Parameter(torch.tensor([0.2]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(input=self.first(x))
        h = torch.div(input=h, other=1.5 + h.pow(exponent=2))
        h = torch.maximum(h, other=0.1 * h) + F.prelu(h, weight=self.slope)
        h = 1 - h + 1 / (2 + h) + 2**h - h.relu().square().sqrt()
        h = h.clamp(min=-2) + torch.var(h, dim=1, keepdim=True, correction=0) + h.std(1, keepdim=True)
        h = F.normalize(h, dim=1) + torch.linalg.norm(h, dim=1, keepdim=True)
        return self.second(torch.stack([*h.unbind(1)], dim=1).softmax(dim=1)).log_softmax(dim=-1)


def weight_normed() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, CLASSES))


def transposed_convolution() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Conv1d(4, CLASSES, 3), nn.Flatten(2),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    )  # fmt: skip


def _sorted(x: Tensor) -> Tensor:
    return torch.sort(x, dim=1).values


def _cumprod(x: Tensor) -> Tensor:
    return torch.cumprod(torch.tanh(x) + 1.2, 1)


def _spectrum(x: Tensor) -> Tensor:
    return torch.fft.rfft(x, dim=1).abs()


def _kinds(*names: str) -> frozenset[str]:
    return frozenset(names)


ISSUE, UNKNOWN = _kinds("issue"), _kinds("issue", "unknown")
"""``issue``: architectures that completeness was promised for by name."""

TABLE: list[Case] = [
    Case("mlp-relu", mlp(nn.ReLU), vectors, smooth=False, kind=ISSUE),
    Case("mlp-tanh", mlp(nn.Tanh), vectors, kind=ISSUE),
    Case("mlp-gelu", mlp(nn.GELU), vectors, kind=ISSUE),
    Case("mlp-mixed", lambda: nn.Sequential(
        nn.Linear(6, 6), nn.LeakyReLU(), nn.Linear(6, 6), nn.ELU(), nn.Linear(6, 6), nn.Hardswish(),
        nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 6), nn.GLU(), nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, CLASSES),
    ), vectors, smooth=False),
    Case("cnn-max", cnn(nn.MaxPool2d, nn.ReLU), images, smooth=False, kind=ISSUE),
    Case("cnn-average", cnn(nn.AvgPool2d, nn.GELU), images, kind=ISSUE),
    Case("residual-batch-norm", Residual, images, smooth=False, kind=_kinds("issue", "batch-norm")),
    Case("encoder", lambda: Encoder(depth=2), tokens, kind=ISSUE),
    Case("encoder-post-norm", lambda: Encoder(norm_first=False), tokens),
    Case("encoder-time-first", lambda: Encoder(batch_first=False), tokens, kind=ISSUE),
    Case("encoder-time-first-readout", lambda: Encoder(batch_first=False, readout="first"), tokens),
    Case("encoder-masked", lambda: Encoder(mask=True, readout="last"), tokens),
    Case("attention-causal", Causal, tokens, kind=ISSUE),
    Case("attention-infinite-mask", Masked, tokens, kind=ISSUE),
    Case("tied-embedding", TiedEmbedding, tokens, outputs=7, kind=_kinds("issue", "shared")),
    Case("twice", Twice, vectors, kind=_kinds("issue", "shared")),
    Case("transposed", Transposed, vectors, kind=_kinds("issue", "shared")),
    Case("conv1d", lambda: Convolutions(1), signals, rate=0.05),
    Case("conv2d", lambda: Convolutions(2), images, rate=0.05),
    Case("conv3d", lambda: Convolutions(3), volumes, rate=0.05),
    Case("conv-transposed", transposed_convolution, signals),
    Case("group-norm", lambda: Normed(lambda: nn.GroupNorm(2, 4)), images),
    Case("instance-norm", lambda: Normed(lambda: nn.InstanceNorm2d(4, affine=True)), images),
    Case("instance-norm-tracked", lambda: Normed(
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), images, kind=_kinds("batch-norm")),
    Case("rms-norm", lambda: Normed(lambda: nn.RMSNorm([4, 4, 4])), images),
    Case("batch-norm-1d", lambda: nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)), vectors, kind=_kinds("batch-norm")),
    Case("sort", lambda: Between(_sorted), vectors, smooth=False, kind=UNKNOWN),
    Case("cumprod", lambda: Between(_cumprod), vectors, kind=UNKNOWN),
    Case("custom-function", lambda: Between(Softplus2.apply), vectors, kind=UNKNOWN),
    Case("custom-numpy", lambda: Between(ArctanByNumpy.apply), vectors, kind=UNKNOWN),
    Case("branch", Branching, vectors, smooth=False, kind=UNKNOWN),
    Case("argmax", Argmax, vectors, smooth=False, kind=UNKNOWN),
    Case("into-plain", IntoPlain, vectors, kind=UNKNOWN),
    Case("lstm", lambda: Recurrent(True), sequences, kind=UNKNOWN),
    Case("lstm-time-first", lambda: Recurrent(False), sequences, kind=UNKNOWN),
    Case("time-maximum", TimeMaximum, sequences, smooth=False, kind=UNKNOWN),
    Case("time-unknown", TimeSort, sequences, kind=UNKNOWN),
    Case("spectrum", lambda: Between(_spectrum, 4), vectors, kind=UNKNOWN),
    Case("weight-norm", weight_normed, vectors, kind=UNKNOWN),
    Case("bilinear", Bilinear, vectors),
    Case("calls", Calls, vectors, smooth=False),
    Case("two-inputs", TwoInputs, tuples),
    Case("named-inputs", Named, dicts),
    Case("scalar", Scalar, vectors, outputs=0, loss="mse", rate=0.02, kind=ISSUE),
]  # fmt: skip

CASES: dict[str, Case] = {case.name: case for case in TABLE}


def names(*, kind: str | None = None, without: str | None = None, smooth: bool | None = None) -> list[str]:
    """Names of the cases of a kind, for parametrising a test."""
    return [
        case.name
        for case in TABLE
        if (kind is None or kind in case.kind)
        and (without is None or without not in case.kind)
        and (smooth is None or case.smooth is smooth)
    ]
