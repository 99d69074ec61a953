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


def sentences(count: int) -> list[dict[str, Tensor]]:
    """Words and how many of them count."""
    lengths = torch.randint(1, 6, (count,))
    return [{"words": torch.randint(1, 7, (5,)), "length": length} for length in lengths]


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


class Stacked(nn.Module):
    """A recurrent net of any kind: its outputs, its last states and a learned first state are all used."""

    def __init__(self, make: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.net = make(6, 4, batch_first=True, **options)
        self.directions = 2 if self.net.bidirectional else 1
        self.start = nn.Parameter(torch.randn(self.net.num_layers * self.directions, 1, self.net.proj_size or 4) / 2)
        self.head = nn.Linear((self.net.proj_size or 4) * self.directions, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = self.start.expand(-1, len(x), -1).contiguous()
        if isinstance(self.net, nn.LSTM):
            outputs, (last, memory) = self.net(x, (state, state.new_zeros(len(state), len(x), 4)))
            extra = memory.mean((0, 2))[:, None]
        else:
            outputs, last = self.net(x, state)
            extra = last.mean((0, 2))[:, None]
        return self.head(outputs.mean(1)) + extra + last.sum((0, 2))[:, None]


class Cells(nn.Module):
    """Recurrent cells in a loop over time; the examples of one of them are the words of a batch's sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4, bias=False)
        self.words, self.head = nn.GRU(2, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h, c, g, r = (x.new_zeros(len(x), 4) for _ in range(4))
        for step in x.unbind(1):
            h, c = self.lstm(step, (h, c))
            g = self.gru(h, g)
            r = self.rnn(g, r)
        words = self.words(x.reshape(-1, 3, 2).transpose(0, 1))[1][0]
        return self.head(r + h + words.view(len(x), -1, 4).mean(1))


class Padded(nn.Module):
    """Sentences of different lengths: padding masks in MultiheadAttention, and in scaled-dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, CLASSES)

    def forward(self, words: Tensor, length: Tensor) -> Tensor:
        there = torch.arange(words.shape[1], device=words.device) < length[:, None]
        h = self.layer(self.words(words), src_key_padding_mask=~there)
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, :])
        return self.head((h * there[..., None]).sum(1) / length[:, None])


class Bags(nn.Module):
    """Bags of embeddings: summed with weights, averaged without padding, bags of two words each, and a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(7, 5, mode=mode, padding_idx=place)
            for mode, place in (("sum", 2), ("mean", 3), ("sum", None), ("max", 6))
        )
        self.head = nn.Linear(5, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        h = self.bags[0](words, per_sample_weights=words.to(self.head.weight.dtype) / 7)
        pairs = self.bags[2](words[:, :4].reshape(-1, 2)).view(len(words), 2, 5)
        return self.head(torch.tanh(h + self.bags[1](words)) * pairs.prod(1) + self.bags[3](words))


class Algebra(nn.Module):
    """Parameters outside any layer, in products of every shape and values computed from them first."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.mix = nn.Parameter(torch.randn(2, 6, 4) / 2), nn.Parameter(torch.randn(4, 4) / 2)
        self.down, self.up = nn.Parameter(torch.randn(2, 8) / 2), nn.Parameter(torch.randn(8, 2) / 2)
        self.temperature, self.gate = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.zeros(8))
        self.missing, self.vector = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.start, self.table = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(5, 8))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        h = torch.einsum("ntd,hdk->nhtk", x, self.heads)
        h = torch.tanh(self.mix @ h + torch.einsum("...k,kj->...j", h, self.mix))
        h = h.transpose(1, 2).reshape(n, 4, 8) + (x.unsqueeze(1) @ self.heads).transpose(1, 2).flatten(2)
        h = h @ (self.up @ self.down) / self.temperature.exp()  # two small matrices in place of one
        h = torch.where(x[..., :1] > 1, self.missing, h) * torch.sigmoid(2 - self.gate)
        h = torch.cat([self.start.repeat(n, 1, 1), h], 1)
        h = h + self.table[x[:, 0].argmax(1) % 5].unsqueeze(1)
        h = torch.tanh(h / self.vector.square().mean().add(1.0).sqrt()).clone()
        h *= self.vector
        h /= 1 + self.gate.abs() + self.vector**2
        return self.head(h.mean(1)) + (h @ self.vector).mean(1, keepdim=True) / 4


class LowRank(nn.Module):
    """A low-rank change of a linear layer, through addmm, and a spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))
        self.shift = nn.Parameter(torch.randn(6))
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(6, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        n, time, d = x.shape
        h = torch.tanh(self.base(x) + torch.addmm(self.shift, x.view(-1, d), self.a @ self.b).view(n, time, d))
        return self.normed(h).mean(1)


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


def transposed_convolutions(dimensions: int) -> nn.Module:
    """Strided, dilated, grouped and padded on both sides."""
    up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    pool = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[dimensions - 1]
    return nn.Sequential(
        up(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Tanh(),
        up(4, CLASSES, 2, dilation=2, padding=1, bias=False), pool(1), nn.Flatten(),
    )  # fmt: skip


def padding_modes() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh(),
        nn.Conv2d(3, 3, 3, padding=(2, 1), padding_mode="reflect", stride=2), nn.Tanh(),
        nn.Conv2d(3, CLASSES, 3, padding="same", padding_mode="replicate"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def dropped() -> nn.Module:
    """Dropout that draws in training, and rests when asked."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 8), nn.GELU(), nn.AlphaDropout(0.2),
        nn.Linear(8, CLASSES),
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
    Case("local-response-norm", lambda: Normed(lambda: nn.LocalResponseNorm(3, alpha=0.5)), images),
    Case("conv-transposed-2d", lambda: transposed_convolutions(2), images, smooth=False),
    Case("conv-transposed-3d", lambda: transposed_convolutions(3), volumes, smooth=False),
    Case("padding-modes", padding_modes, images),
    Case("embedding-bags", Bags, tokens, smooth=False),
    Case("attention-padded", Padded, sentences, smooth=False),
    Case("gru", lambda: Stacked(nn.GRU, num_layers=2, bidirectional=True), sequences, rate=0.05),
    Case("rnn", lambda: Stacked(nn.RNN, num_layers=2, bias=False), sequences, rate=0.05),
    Case("rnn-relu", lambda: Stacked(
        nn.RNN, nonlinearity="relu", bidirectional=True), sequences, smooth=False, rate=0.02),
    Case("lstm-stacked", lambda: Stacked(nn.LSTM, num_layers=2, bidirectional=True), sequences, rate=0.05),
    Case("cells", Cells, sequences),
    Case("algebra", Algebra, sequences, smooth=False, rate=0.02),
    Case("low-rank", LowRank, sequences, kind=_kinds("batch-norm")),
    Case("dropout", dropped, vectors, smooth=False, kind=_kinds("random")),
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
