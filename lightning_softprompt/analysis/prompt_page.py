"""The tables and the HTML page of `softprompt inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightning_softprompt.analysis.soft_tokens import (
    CAVEAT,
    REDUNDANT,
    Drift,
    NearWord,
    SoftToken,
    effective_rank,
    redundant_pairs,
    singular_values,
    token_cosines,
)
from lightning_softprompt.reports.html import image, page
from lightning_softprompt.system.printable import html_text

Rows = list[list[str]]
WIDEST_HEATMAP = 200  # soft tokens


@dataclass(frozen=True)
class PromptReport:
    """What `softprompt inspect` found out about a prompt.

    Args:
        title: Title of the page.
        facts: Descriptions by name, such as the method.
        blocks: The soft tokens, keys and values of the prompt [P, size], by name.
        tokens: The soft tokens of the input, with their nearest words; empty for a prompt without them.
        drift: Their change from another prompt, if one was named.
        scores: Validation metrics by variant of the prompt; empty if they were not requested.
    """

    title: str
    facts: Mapping[str, str]
    blocks: Mapping[str, Tensor]
    tokens: Sequence[SoftToken]
    drift: Drift | None
    scores: Mapping[str, Mapping[str, float]]

    def block_rows(self) -> tuple[list[str], Rows]:
        """Returns header and rows of the table of blocks."""
        rows = []
        for name, block in self.blocks.items():
            positions, width = block.shape
            mean_norm = block.norm(dim=1).mean()
            rank = f"{effective_rank(block):.1f} of {positions}"
            pairs = redundant_pairs(block)
            rows.append([name, f"{positions} x {width}", f"{mean_norm:.3g}", rank, str(len(pairs))])
        return ["part", "size", "mean norm", "effective rank", f"pairs with cosine > {REDUNDANT}"], rows

    def token_rows(self) -> tuple[list[str], Rows]:
        """Returns header and rows of the table of soft tokens."""
        header = ["token", "norm", "nearest words by cosine", "nearest words by distance"]
        if self.drift is not None:
            header[2:2] = ["change", "cosine to other"]
        rows = []
        for number, token in enumerate(self.tokens):
            row = [str(number), f"{token.norm:.2f}", _join(token.by_cosine), _join(token.by_distance)]
            if self.drift is not None:
                row[2:2] = [f"{self.drift.distances[number]:.2f}", f"{self.drift.cosines[number]:.2f}"]
            rows.append(row)
        return header, rows

    def score_rows(self) -> tuple[list[str], Rows]:
        """Returns header and rows of the table of scores."""
        names = list(next(iter(self.scores.values())))
        rows = [[variant, *(f"{values[name]:.4f}" for name in names)] for variant, values in self.scores.items()]
        return ["prompt", *names], rows

    def to_html(self) -> str:
        """Returns the page."""
        facts = "".join(f"<dt>{html_text(name)}</dt><dd>{html_text(text)}</dd>" for name, text in self.facts.items())
        body = f"<dl>{facts}</dl>"
        body += "<h2>Parts</h2>" + _html_table(*self.block_rows())
        body += (
            "<p>The effective rank is exp of the entropy of the normalized singular values: 1 if all positions are "
            "multiples of one, the number of positions if they are orthogonal and of equal norm.</p>"
        )
        body += image("singular values of each part", spectrum_figure(self.blocks))
        if self.tokens:
            body += f"<h2>Soft tokens</h2><p>{html_text(CAVEAT)}</p>"
            body += "<p>Norms are in units of the mean norm of the word embeddings.</p>"
            body += _html_table(*self.token_rows())
            if 1 < len(self.tokens) <= WIDEST_HEATMAP:
                figure = cosine_figure(token_cosines(self.blocks["tokens"]))
                body += image("cosine of each pair of soft tokens", figure)
        if self.scores:
            body += "<h2>Validation</h2>" + _html_table(*self.score_rows())
        return page(self.title, body)


def _join(words: Sequence[NearWord]) -> str:
    return ", ".join(f"{word.text!r} {word.value:.2f}" for word in words)


def _html_table(header: Sequence[str], rows: Rows) -> str:
    head = "".join(f"<th>{html_text(name)}</th>" for name in header)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html_text(cell)}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def spectrum_figure(blocks: Mapping[str, Tensor]) -> Figure:
    """Plots the singular values of each block, relative to the largest one."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    for name, block in blocks.items():
        values = singular_values(block)
        ranks = range(1, len(values) + 1)
        label = name if len(blocks) <= 4 else None
        axes.plot(ranks, (values / values[0]).numpy(), marker="." if len(values) < 60 else "", linewidth=1, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("relative size")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(blocks) <= 4:
        axes.legend(frameon=False)
    return figure


def cosine_figure(cosines: Tensor) -> Figure:
    """Plots the cosines [P, P] of soft tokens as a heat map."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    heat_map = axes.imshow(cosines.numpy(), cmap="RdBu", vmin=-1, vmax=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("soft token")
    axes.set_ylabel("soft token")
    figure.colorbar(heat_map, label="cosine")
    return figure
