"""Sampling weights of rows by their source, or by clusters of similar rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

from lightning_softprompt.data.curricula.base import Curriculum, RowPlan
from lightning_softprompt.data.difficulty.base import ScoringModel
from lightning_softprompt.data.prepared import PreparedRows
from lightning_softprompt.data.sampling.task_mixing import Sampling, UniformTasks
from lightning_softprompt.retrieval.search.encoder import load_encoder

Vectors = npt.NDArray[np.float32]
ITERATIONS = 50  # most of k-means


@final
@dataclass(frozen=True)
class SourceWeights(Curriculum):
    """Samples rows, with replacement, so that each source has its rate.

    Args:
        sampling: Relative rates of the sources by their numbers of rows (default: the same rate for each source).
        column: Column of the template that names the source of a row (default: the file of the row).
    """

    sampling: Sampling = field(default_factory=UniformTasks)
    column: str | None = None

    def plan(self, rows: PreparedRows, model: ScoringModel) -> RowPlan:
        """Returns the weight of each row.

        Raises:
            ValueError: If the rows have only one source, or lack the column.
        """
        if self.column is None:
            sources = [str(origin.file) for origin in rows.origins]
        elif self.column in rows.examples[0].fields:
            sources = [rows.examples[row].fields[self.column] for row in range(len(rows))]
        else:
            columns = list(rows.examples[0].fields)
            raise ValueError(f"{self.column!r} is not a column of the template; columns: {columns}")
        if len(set(sources)) == 1:
            raise ValueError(f"all rows have the source {sources[0]!r}; weights by source require several")
        return RowPlan(weights=weights_of_groups(sources, self.sampling))


@final
@dataclass(frozen=True)
class ClusterWeights(Curriculum):
    """Samples rows, with replacement, so that each cluster of similar rows has its rate: rare kinds of rows count more.

    Clusters are those of k-means on embeddings of the rows' texts.

    Args:
        clusters: Number of clusters.
        sampling: Relative rates of the clusters by their numbers of rows (default: the same rate for each cluster).
        encoder: The encoder of the embeddings.
        seed: Seed of the clustering.

    Raises:
        ValueError: If there are fewer than two clusters.
    """

    clusters: int = 8
    sampling: Sampling = field(default_factory=UniformTasks)
    encoder: str = "all-minilm-l6-v2"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clusters < 2:
            raise ValueError(f"clusters must be at least 2, got {self.clusters}")

    def plan(self, rows: PreparedRows, model: ScoringModel) -> RowPlan:
        """Returns the weight of each row."""
        texts = [" ".join(rows.examples[row].fields.values()) for row in range(len(rows))]
        vectors = load_encoder(self.encoder).passages(texts)
        groups = cluster(vectors, self.clusters, self.seed)
        return RowPlan(weights=weights_of_groups([str(group) for group in groups], self.sampling))


def weights_of_groups(groups: Sequence[str], sampling: Sampling) -> list[float]:
    """Returns the weight of each row, so that groups are sampled by their rates.

    >>> weights_of_groups(["a", "a", "b"], UniformTasks())
    [0.5, 0.5, 1.0]
    """
    sizes = dict(sorted(Counter(groups).items()))
    rates = dict(zip(sizes, sampling.rates(sizes), strict=True))
    return [rates[group] / sizes[group] for group in groups]


def cluster(vectors: Vectors, count: int, seed: int) -> list[int]:
    """Returns the cluster of each vector, by k-means with distant starts (Arthur and Vassilvitskii 2007).

    Raises:
        ValueError: If there are fewer vectors than clusters.
    """
    if len(vectors) < count:
        raise ValueError(f"{len(vectors)} rows cannot be divided into {count} clusters")
    draw = np.random.default_rng(seed)
    centers = vectors[[draw.integers(len(vectors))]]
    while len(centers) < count:
        nearest = squared_distances(vectors, centers).min(1)
        odds = nearest / nearest.sum() if nearest.sum() else None
        centers = np.concatenate([centers, vectors[[draw.choice(len(vectors), p=odds)]]])
    groups = squared_distances(vectors, centers).argmin(1)
    for _ in range(ITERATIONS):
        occupied = [group for group in range(count) if (groups == group).any()]
        for group in occupied:
            centers[group] = vectors[groups == group].mean(0)
        changed = squared_distances(vectors, centers).argmin(1)
        if (changed == groups).all():
            break
        groups = changed
    return [int(group) for group in groups]


def squared_distances(vectors: Vectors, centers: Vectors) -> npt.NDArray[np.float64]:
    """Returns the squared distance of each vector to each center."""
    rows, columns = vectors.astype(np.float64), centers.astype(np.float64)
    row_lengths = (rows**2).sum(1)[:, None]
    column_lengths = (columns**2).sum(1)
    distances: npt.NDArray[np.float64] = row_lengths + column_lengths - 2 * rows @ columns.T
    return distances.clip(min=0)
