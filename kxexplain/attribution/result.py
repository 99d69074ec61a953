"""The finished bill of a batch of predictions: look it up, print it, plot it, save it."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kxexplain.errors import ArgumentError, MissingExtraError, TrajectoryError

FORMAT = "kxexplain-explanation-1"
LINES = ("baseline", "contributions", "regularizer", "penalty", "buffers", "unattributed", "remainder", "prediction")
AXES = {
    "contributions": "qnc", **dict.fromkeys((n for n in LINES if n != "contributions"), "qc"), "path_kernel": "qncc",
    "output": "q", "timeline.steps": "S", "timeline.examples": "qk", "timeline.bins": "B", "timeline.shares": "bqkc",
    **{f"totals.{name}": "sqc" for name in LINES[1:6]}, "added": "qac",
}  # fmt: skip
"""A file's tensors: query, example n, output c (if all are explained), segment s, bin b, their borders S and B, and
terms a that were added after training."""
WHOLE_NUMBERS = ("output", "timeline.steps", "timeline.examples", "timeline.bins")
OPTIONAL = ("path_kernel", "output", "added")


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

    Axes: query, train; with ``target="all"`` every array gains an output axis at the end.

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
        ranked = one.top(k)
        up = [
            (int(i), float(v))
            for i, v in zip(ranked.proponents[query], ranked.proponent_values[query], strict=True)
            if v > 0
        ]
        down = [
            (int(i), float(v))
            for i, v in zip(ranked.opponents[query], ranked.opponent_values[query], strict=True)
            if v < 0
        ]
        total = float(one.contributions[query].double().sum())
        rest = total - sum(v for _, v in up + down)
        table = Table(title=one._title(query), title_justify="left")
        for name, justify in (("", "left"), ("amount", "right"), ("running total", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        running = float(one.baseline[query])
        table.add_row("baseline (initial model)", "", f"{running:+.4f}")
        lines = [(f"example {i}{self._label(i)}", v) for i, v in up]
        lines.append((f"{one.contributions.shape[1] - len(up) - len(down)} other examples", rest))
        lines += [(f"example {i}{self._label(i)}", v) for i, v in reversed(down)]
        lines += one._added_lines(query, k)
        rounding = float(one.remainder[query])
        visible = 1e-5 * max(abs(float(one.prediction[query])), abs(float(one.baseline[query])), 1e-30)
        for name in LINES[2:6]:
            amount = float(getattr(one, name)[query])
            if abs(amount) > visible:
                lines.append((name, amount))
            else:
                rounding += amount
        lines.append(("remainder (rounding)" if abs(rounding) <= visible else "remainder", rounding))
        for name, amount in lines:
            running += amount
            table.add_row(
                name,
                f"{amount:+.4f}" if abs(amount) >= 5e-5 or amount == 0 else f"{amount:+.1e}",
                f"{running:+.4f}",
            )
        table.add_section()
        table.add_row("prediction", "", f"{float(one.prediction[query]):+.4f}")
        return table

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
        target = Path(path)
        if target.is_dir():
            raise TrajectoryError(f"{target} is a folder; give the name of a file to write the explanation to")
        tensors = {name: getattr(self, name) for name in (*LINES, "path_kernel", "output", "labels", "added")}
        tensors |= {
            f"timeline.{name}": getattr(self.timeline, name) for name in ("steps", "examples", "bins", "shares")
        }
        tensors |= {f"totals.{name}": value for name, value in self.timeline.totals.items()}
        if isinstance(self.queries, Tensor):
            tensors["queries"] = self.queries
        kept = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items() if value is not None}
        facts = {**self.facts, "added": list(self.added_names)} if self.added_names else self.facts
        unfinished = target.with_name(f".{target.name}.unfinished")
        try:
            save_file(kept, unfinished, {"format": FORMAT, "facts": json.dumps(facts)})
            os.replace(unfinished, target)
        except (OSError, SafetensorError) as error:
            raise TrajectoryError(
                f"{target} cannot be written: {error}; give the name of a file in a folder that can be written to"
            ) from error
        finally:
            with suppress(OSError):
                unfinished.unlink()
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], dataset: Any = None) -> Explanation:
        """Read a saved explanation; runs no code of the file's. ``dataset`` is only for pictures.

        Raises:
            TrajectoryError: missing, damaged, or no explanation.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise TrajectoryError(f"{path} is not a readable explanation: {error}") from error
        if "contributions" in tensors and "regularizer" in tensors:  # files from before there were penalties
            tensors.setdefault("penalty", torch.zeros_like(tensors["regularizer"]))
        if "totals.regularizer" in tensors:
            tensors.setdefault("totals.penalty", torch.zeros_like(tensors["totals.regularizer"]))
        facts = _facts(about)
        problem = "facts that are missing or no JSON object" if facts is None else _misfit(tensors)
        if about.get("format") != FORMAT:
            problem = f"format {about.get('format')!r}"
        if facts is None or problem:
            raise TrajectoryError(f"{path} is no explanation of format {FORMAT}: got {problem}; save it anew")
        timeline = Timeline(
            totals={n.removeprefix("totals."): t for n, t in tensors.items() if n.startswith("totals.")},
            **{name: tensors[f"timeline.{name}"] for name in ("steps", "examples", "bins", "shares")},
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


def _facts(about: dict[str, str]) -> dict[str, Any] | None:
    """The facts in a file's metadata."""
    try:
        facts = json.loads(about["facts"])
    except (KeyError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _misfit(tensors: dict[str, Tensor]) -> str | None:
    """In words, what is wrong with a file's tensors."""
    sizes: dict[str, int] = {}
    for name, axes in AXES.items():
        if name not in tensors:
            if name in OPTIONAL:
                continue
            return f"no {name}"
        found = tensors[name]
        letters = axes if tensors["contributions"].dim() == 3 else axes.replace("c", "")
        fits = found.dim() == len(letters) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(letters, found.shape, strict=True)
        )
        if not fits or found.is_floating_point() == (name in WHOLE_NUMBERS):
            return f"{name} of type {found.dtype} and shape {tuple(found.shape)}, where {sizes} are known"
    for name in ("labels", "queries"):
        if name in tensors and tensors[name].shape[:1] != (sizes["q"],):
            return f"{name} of shape {tuple(tensors[name].shape)} for {sizes['q']} queries"
    if sizes["S"] != sizes["s"] + 1 or sizes["B"] != sizes["b"] + 1:
        return f"timeline borders that do not fit its segments or bins: {sizes}"
    examples = tensors["timeline.examples"]
    if bool(((examples < 0) | (examples >= sizes["n"])).any()):
        return f"timeline.examples that are not among the {sizes['n']} examples"
    return None


def _whole(value: Any, name: str) -> int:
    """A whole number, of whatever type."""
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"got {name}={value!r}; expected a whole number") from None


def _norm(blocks: Tensor) -> Tensor:
    return blocks.abs().sum(-2).amax(-1)


__all__: Sequence[str] = ["Explanation", "Ranking", "Timeline"]
