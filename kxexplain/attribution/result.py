"""The finished bill of a batch of predictions: look it up, print it, plot it, save it."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kxexplain.attribution import file
from kxexplain.attribution.file import LINES
from kxexplain.errors import ArgumentError, MissingExtraError

TIMELINE = ("steps", "examples", "bins", "shares")


@dataclass(frozen=True)
class Timeline:
    """When in training the bill's amounts came about.

    A contribution stands at the step that the gradient entered, all of it: under momentum or Adam it goes on moving the
    parameters afterwards. Decay that is charged to updates, and counters among the buffers, stand in the first segment.

    Attributes:
        steps: the segments' borders, [segment + 1].
        totals: per line of the bill, amounts by segment, [segment, query] (and an output axis for all outputs).
        examples: the examples with the largest contributions, [query, k].
        bins: step borders of the bins that ``shares`` is kept in, [bin + 1]; as coarse as memory asks for.
        shares: those examples' amounts by bin, [bin, query, k].
    """

    steps: Int[Tensor, " border"]
    totals: dict[str, Tensor]
    examples: Int[Tensor, "query k"]
    bins: Int[Tensor, " binborder"]
    shares: Tensor


@dataclass(frozen=True)
class Ranking:
    """The largest contributions of each query, proponents first, opponents first.

    Attributes:
        proponents: dataset indices by falling positive contribution, [query, k].
        opponents: dataset indices by rising negative contribution, [query, k].
        proponent_values: their contributions, [query, k].
        opponent_values: their contributions, [query, k].
    """

    proponents: Int[Tensor, "query k"]
    proponent_values: Float[Tensor, "query k"]
    opponents: Int[Tensor, "query k"]
    opponent_values: Float[Tensor, "query k"]


@dataclass(frozen=True)
class Explanation:
    """Why a model predicts what it predicts: baseline + Σ contributions + … = prediction.

    Axes: query, train; with ``target="all"`` every array gains an output axis at the end. Values are of the model's
    type, or of float64 where the bill was computed in that (``facts["precision"]``).

    Attributes:
        contributions: what each training example put in, [query, train].
        baseline: the initial model's value, [query].
        prediction: the trained model's value, [query].
        regularizer: what weight decay put in, [query].
        penalty: what a penalty on the loss' gradient put in, [query].
        buffers: what running statistics put in, [query].
        unattributed: parameter movement that no itemised cause explains, [query].
        remainder: prediction less everything above: rounding, for a faithfully recorded run, [query].
        path_kernel: K(x, x_i) where it was asked for, [query, train] (or [query, train, output, output]).
        timeline: when it came about.
        output: the output number explained per query, where there is one, [query].
        labels: the queries' targets, where given.
        facts: what was explained and how.
        dataset: the training examples, for pictures; not saved.
        queries: the queries' inputs.
        added: terms that came after training (:meth:`kxexplain.IncrementalModel.explain`), [query, term].
        added_names: what those are called.
    """

    contributions: Tensor
    baseline: Tensor
    prediction: Tensor
    regularizer: Tensor
    penalty: Tensor
    buffers: Tensor
    unattributed: Tensor
    remainder: Tensor
    path_kernel: Tensor | None
    timeline: Timeline
    output: Tensor | None = None
    labels: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    dataset: Any = field(default=None, repr=False, compare=False)
    queries: Any = field(default=None, repr=False, compare=False)
    added: Tensor | None = None
    added_names: Sequence[str] = ()

    def __len__(self) -> int:
        return self.contributions.shape[0]

    @property
    def all_outputs(self) -> bool:
        """Whether every output is explained, so that arrays have an output axis."""
        return self.contributions.dim() == 3

    @property
    def kernel(self) -> Tensor:
        """K(x, x_i): the path kernel along the visits of example i, [query, train] or with C × C blocks.

        For one explained output of several, K measures along the direction in which the example pulled the
        outputs (K = Σ_t w ⟨D_t(x), ∇(e·f)(x_i)⟩, e the direction of −∂ℓ/∂f), which makes α = ‖∂ℓ/∂f‖ averaged
        with K for weight; with a single output e = 1. It is not symmetric: a discrete gradient stands on the
        query's side, the gradient at the step's start on the example's.

        Raises:
            ArgumentError: it was not asked for.
        """
        if self.path_kernel is None:
            raise ArgumentError("this explanation was made without its kernel; call kx.explain(..., kernel=True)")
        return self.path_kernel

    @cached_property
    def alpha(self) -> Tensor:
        """α_i(x) with contributions = K α, in the shape of ``contributions``; NaN where K is (nearly) singular."""
        kernel = self.kernel
        if self.all_outputs:
            inverse, _ = torch.linalg.inv_ex(kernel)
            condition = _norm(kernel) * _norm(inverse)
            solved = (inverse @ self.contributions[..., None])[..., 0]
            good = condition.isfinite() & (condition < torch.finfo(kernel.dtype).eps ** -0.75)
            return torch.where(good[..., None], solved, torch.nan)
        scale = kernel.abs().amax(1, keepdim=True)
        good = kernel.abs() > torch.finfo(kernel.dtype).eps ** 0.5 * scale
        return torch.where(good, self.contributions / kernel.masked_fill(~good, 1.0), torch.nan)

    @property
    def defined(self) -> Bool[Tensor, "query train"]:
        """Where α means something."""
        return ~self.alpha.isnan().any(-1) if self.all_outputs else ~self.alpha.isnan()

    def of_output(self, output: int) -> Explanation:
        """One output's bill out of an explanation of all outputs.

        Raises:
            ArgumentError: the explanation is of one output already, or has no such output.
        """
        columns = self.contributions.shape[-1]
        if not self.all_outputs or not -columns <= output < columns:
            raise ArgumentError(
                f"output {output} was asked for of an explanation of target {self.facts.get('target')!r}"
            )
        line = self.timeline
        totals = {name: t[..., output] for name, t in line.totals.items()}
        parts = {name: getattr(self, name)[..., output] for name in LINES}
        number = torch.full((len(self),), output % columns)
        added = None if self.added is None else self.added[..., output]
        facts = {**self.facts, "target": str(output % columns)}
        return replace(
            self, **parts, path_kernel=None, output=number, added=added, facts=facts,
            timeline=replace(line, totals=totals, shares=line.shares[..., output]),
        )  # fmt: skip

    def top(self, k: int = 10) -> Ranking:
        """The k largest positive and negative contributions of every query.

        Raises:
            ArgumentError: k is no whole number of at least 1, or all outputs were explained (choose one with
                :meth:`of_output`).
        """
        if self.all_outputs:
            raise ArgumentError("all outputs were explained; rank one of them: explanation.of_output(c).top(k)")
        k = _whole(k, "k")
        if k < 1:
            raise ArgumentError(f"got k={k}; expected a whole number of at least 1")
        k = min(k, self.contributions.shape[1])
        most, least = self.contributions.topk(k, dim=1), self.contributions.topk(k, dim=1, largest=False)
        return Ranking(most.indices, most.values, least.indices, least.values)

    def table(self, query: int = 0, k: int = 5) -> Table:
        """One query's bill as a table with a running total, from baseline to prediction.

        A regularizer, penalty, buffers or unattributed amount below 1e-5 of the larger of |baseline| and |prediction|
        has no line of its own: it is added to the remainder's. The attributes of these names hold each as it is.

        Raises:
            ArgumentError: there is no such query, or k is no whole number of at least 1.
        """
        one = self._one(query)
        table = Table(title=one._title(query), title_justify="left")
        for name, justify in (("", "left"), ("amount", "right"), ("running total", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        running = float(one.baseline[query])
        table.add_row("baseline (initial model)", "", f"{running:+.4f}")
        for name, amount in [*one._example_lines(query, k), *one._added_lines(query, k), *one._other_lines(query)]:
            running += amount
            shown = f"{amount:+.4f}" if abs(amount) >= 5e-5 or amount == 0 else f"{amount:+.1e}"
            table.add_row(name, shown, f"{running:+.4f}")
        table.add_section()
        table.add_row("prediction", "", f"{float(one.prediction[query]):+.4f}")
        return table

    def _example_lines(self, query: int, k: int) -> list[tuple[str, float]]:
        """The k proponents, all others in one, and the k opponents, the largest last."""
        ranked = self.top(k)
        pairs = ((ranked.proponents, ranked.proponent_values), (ranked.opponents, ranked.opponent_values))
        up, down = (
            [(int(i), float(v)) for i, v in zip(ids[query], values[query], strict=True) if v * sign > 0]
            for sign, (ids, values) in zip((1, -1), pairs, strict=True)
        )
        rest = float(self.contributions[query].double().sum()) - sum(v for _, v in up + down)
        return [
            *((f"example {i}{self._label(i)}", v) for i, v in up),
            (f"{self.contributions.shape[1] - len(up) - len(down)} other examples", rest),
            *((f"example {i}{self._label(i)}", v) for i, v in reversed(down)),
        ]

    def _other_lines(self, query: int) -> list[tuple[str, float]]:
        """What is no example's: those amounts that are visible, then the remainder with the others."""
        rounding, lines = float(self.remainder[query]), []
        visible = 1e-5 * max(abs(float(self.prediction[query])), abs(float(self.baseline[query])), 1e-30)
        for name in LINES[2:6]:
            amount = float(getattr(self, name)[query])
            if abs(amount) > visible:
                lines.append((name, amount))
            else:
                rounding += amount
        return [*lines, ("remainder (rounding)" if abs(rounding) <= visible else "remainder", rounding)]

    def _added_lines(self, query: int, k: int) -> list[tuple[str, float]]:
        """The 2k largest of the terms that came after training, in the order they came, and the sum of the others."""
        if self.added is None or not self.added_names:
            return []
        values = self.added[query].double()
        largest = sorted(values.abs().topk(min(2 * k, len(values))).indices.tolist())
        lines = [(f"added: {self.added_names[i]}", float(values[i])) for i in largest]
        if len(largest) < len(values):
            rest = float(values.sum()) - sum(v for _, v in lines)
            lines.append((f"added: {len(values) - len(largest)} others", rest))
        return lines

    def bill(self, query: int = 0, k: int = 5) -> str:
        """One query's bill as text: :meth:`table`, drawn.

        Raises:
            ArgumentError: there is no such query, or k is no whole number of at least 1.
        """
        with open(os.devnull, "w") as nowhere:
            console = Console(width=78, file=nowhere, record=True, force_jupyter=False)
            console.print(self.table(query, k))
            return "\n".join(line.rstrip() for line in console.export_text().splitlines()).rstrip()

    def __str__(self) -> str:
        shown = min(3, len(self))
        bills = [self.bill(query) for query in range(shown)]
        more = [f"… and {len(self) - shown} more queries: print(explanation.bill(i))"] if len(self) > shown else []
        return "\n".join(bills + more)

    def __repr__(self) -> str:
        facts = ", ".join(f"{k}={v!r}" for k, v in self.facts.items() if k in ("target", "rule", "steps"))
        worst = float(self.remainder.abs().max())
        size = f"{len(self)} queries × {self.contributions.shape[1]} examples"
        return f"Explanation({size}, {facts}, remainder ≤ {worst:.1e})"

    def plot(self, query: int = 0, **options: Any) -> Any:
        """Waterfall, proponents and opponents (as pictures where inputs are images) and timeline: a figure.

        Options are those of :func:`kxexplain.plots.plot_explanation`.
        """
        from kxexplain.plots import plot_explanation

        return plot_explanation(self._one(query), query, **options)

    def to_pandas(self, query: int = 0) -> Any:
        """One query's bill as a data frame: a row per example.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError('a data frame needs pandas: pip install "kxexplain[pandas]"') from error
        one = self._one(query)
        columns = {
            "example": range(one.contributions.shape[1]),
            "contribution": one.contributions[query].cpu().numpy(),
        }
        if one.path_kernel is not None:
            columns["kernel"] = one.path_kernel[query].cpu().numpy()
            columns["alpha"] = one.alpha[query].cpu().numpy()
        return pandas.DataFrame(columns)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything but the dataset to one safetensors file; written whole or not at all.

        Raises:
            TrajectoryError: the folder cannot be written to, or the path is a folder itself.
        """
        tensors = {name: getattr(self, name) for name in (*LINES, "path_kernel", "output", "labels", "added")}
        tensors |= {f"timeline.{name}": getattr(self.timeline, name) for name in TIMELINE}
        tensors |= {f"totals.{name}": value for name, value in self.timeline.totals.items()}
        if isinstance(self.queries, Tensor):
            tensors["queries"] = self.queries
        facts = {**self.facts, "added": list(self.added_names)} if self.added_names else self.facts
        return file.write(path, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], dataset: Any = None) -> Explanation:
        """Read a saved explanation; runs no code of the file's. ``dataset`` is only for pictures.

        Raises:
            TrajectoryError: missing, damaged, or no explanation.
        """
        tensors, facts = file.read(path)
        timeline = Timeline(
            totals={n.removeprefix("totals."): t for n, t in tensors.items() if n.startswith("totals.")},
            **{name: tensors[f"timeline.{name}"] for name in TIMELINE},
        )
        return cls(
            **{name: tensors[name] for name in LINES},
            path_kernel=tensors.get("path_kernel"),
            output=tensors.get("output"),
            labels=tensors.get("labels"),
            queries=tensors.get("queries"),
            timeline=timeline,
            added=tensors.get("added"),
            added_names=tuple(facts.pop("added", ())),
            facts=facts,
            dataset=dataset,
        )

    def _one(self, query: int) -> Explanation:
        if not -len(self) <= _whole(query, "query") < len(self):
            raise ArgumentError(f"query {query} was asked for, but there are {len(self)}; give 0 to {len(self) - 1}")
        return self.of_output(int(self.prediction[query].argmax())) if self.all_outputs else self

    def _title(self, query: int) -> str:
        target = str(self.facts.get("target"))
        of = f" of output {int(self.output[query])}" if self.output is not None and target != "margin" else ""
        known = "" if self.labels is None or self.labels.dim() != 1 else f", label {self.labels[query].item():g}"
        return f"query {query}: {target if not target.isdigit() else 'value'}{of}{known}"

    def _label(self, example: int) -> str:
        if self.dataset is None:
            return ""
        _, label = self.dataset[example]
        value = label.item() if isinstance(label, Tensor) and label.numel() == 1 else label
        return f" (label {value:g})" if isinstance(value, (int, float)) else ""


def _whole(value: Any, name: str) -> int:
    """A whole number, of whatever type."""
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"got {name}={value!r}; expected a whole number") from None


def _norm(blocks: Tensor) -> Tensor:
    return blocks.abs().sum(-2).amax(-1)


__all__: Sequence[str] = ["Explanation", "Ranking", "Timeline"]
