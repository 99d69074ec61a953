"""What a search found: proponents, opponents and nearest examples of every query."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kxexplain.errors import ArgumentError

SHOWN = 3
"""Queries that are printed."""


@dataclass(frozen=True)
class Hits:
    """Training examples found for every query, best first.

    Attributes:
        ids: dataset indices, [query, k].
        scores: what they were found by, [query, k]: approximate contributions, or cosines.
        contributions: exact contributions, [query, k], where candidates were re-ranked.
        labels: the examples' labels, [query, k], where they are single numbers.
    """

    ids: Int[Tensor, "query k"]
    scores: Float[Tensor, "query k"]
    contributions: Float[Tensor, "query k"] | None = None
    labels: Tensor | None = None

    @property
    def values(self) -> Float[Tensor, "query k"]:
        """What they are ordered by: exact contributions where known, else the scores."""
        return self.scores if self.contributions is None else self.contributions


@dataclass(frozen=True)
class Neighbors:
    """The training examples that matter for each query, from :meth:`GradientIndex.search`.

    Attributes:
        proponents: largest contributions first; fewer than k may be positive.
        opponents: smallest (most negative) contributions first.
        nearest: largest cosine first: the examples whose updates moved the parameters most nearly the way the
            query's own loss would have; of ``scores`` between −1 and 1, and never re-ranked.
        output: the output number asked about, per query, where there is one, [query].
        labels: the queries' labels, where given.
        facts: target, rerank, dimension, index type, and what ``nearest`` was measured with.
        dataset: the training examples, for pictures.
        queries: the queries' inputs, for pictures.

    >>> import torch
    >>> hits = Hits(torch.tensor([[4, 2]]), torch.tensor([[0.5, 0.25]]))
    >>> neighbors = Neighbors(hits, hits, hits)
    >>> len(neighbors), neighbors.proponents.ids.tolist()
    (1, [[4, 2]])
    """

    proponents: Hits
    opponents: Hits
    nearest: Hits
    output: Tensor | None = None
    labels: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    dataset: Any = field(default=None, repr=False, compare=False)
    queries: Any = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return self.proponents.ids.shape[0]

    def table(self, query: int = 0) -> Table:
        """One query's three lists, side by side.

        Raises:
            ArgumentError: there is no such query.
        """
        self._check(query)
        target = self.facts.get("target", "")
        of = "" if self.output is None else f" (output {int(self.output[query])})"
        table = Table(title=f"query {query}: {target}{of}", title_justify="left")
        exact = "contribution" if self.proponents.contributions is not None else "≈ contribution"
        for name, measure in (("proponent", exact), ("opponent", exact), ("nearest", "cosine")):
            table.add_column(name)
            table.add_column(measure, justify="right")
        for rank in range(self.proponents.ids.shape[1]):
            cells = []
            for hits in (self.proponents, self.opponents, self.nearest):
                label = "" if hits.labels is None else f" (label {hits.labels[query, rank].item():g})"
                cells += [f"{int(hits.ids[query, rank])}{label}", f"{float(hits.values[query, rank]):+.4f}"]
            table.add_row(*cells)
        return table

    def __str__(self) -> str:
        console = Console(width=100, file=io.StringIO(), record=True, force_jupyter=False)
        shown = min(SHOWN, len(self))
        for query in range(shown):
            console.print(self.table(query))
        if len(self) > shown:
            console.print(f"… and {len(self) - shown} more queries: print(neighbors.table(i))")
        return "\n".join(line.rstrip() for line in console.export_text().splitlines()).rstrip()

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value!r}" for name, value in self.facts.items())
        return f"Neighbors({len(self)} queries × {self.proponents.ids.shape[1]}, {facts})"

    def plot(self, query: int = 0, **options: Any) -> Any:
        """One query with its proponents, opponents and nearest examples, as pictures where inputs are images.

        Options are those of :func:`kxexplain.plots.plot_neighbors`.

        Raises:
            ArgumentError: there is no such query.
        """
        from kxexplain.plots import plot_neighbors

        self._check(query)
        return plot_neighbors(self, self.dataset, self.queries, query, **options)

    def _check(self, query: int) -> None:
        if not -len(self) <= query < len(self):
            raise ArgumentError(f"query {query} was asked for, but there are {len(self)}")
