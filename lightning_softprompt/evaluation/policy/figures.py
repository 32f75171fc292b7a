"""Plots of sampled answers and their rewards."""

from __future__ import annotations

from math import sqrt

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.text_rows import GatheredRows, Numbers
from lightning_softprompt.evaluation.policy.answer_metrics import best_of_n, is_known, wins

BINS = 20
GROUPS = 4  # of questions by their length
POLICY, REFERENCE = "tab:blue", "tab:gray"


def answer_figures(answers: GatheredRows) -> dict[str, Figure]:
    """Returns the figures of a test by name."""
    columns = answers.columns
    figures = {
        "rewards": reward_figure(answers),
        "win_rate_by_length": win_rate_figure(
            columns["question_words"], columns["reward"], columns["reference_reward"]
        ),
    }
    if is_known(columns["kl"]):
        figures["reward_over_kl"] = divergence_figure(answers)
    return figures


def reward_figure(answers: GatheredRows) -> Figure:
    """Plots histograms of the rewards, and of the judge's if there is one, of policy and reference."""
    columns = answers.columns
    names = ["reward", *(["judge"] if is_known(columns["judge"]) else [])]
    figure = Figure(figsize=(4.2 * len(names) + 0.4, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        both = {"reference": columns[f"reference_{name}"], "policy": columns[name]}
        edges = np.histogram_bin_edges(np.concatenate(list(both.values())), BINS)
        for (label, values), color in zip(both.items(), (REFERENCE, POLICY), strict=True):
            axes.hist(values, bins=edges, color=color, alpha=0.5, label=f"{label}, mean {values.mean():.3f}")
            axes.axvline(values.mean(), color=color, lw=1)
        axes.set_xlabel(name)
        axes.set_ylabel("answers")
        _tidy(axes)
    return figure


def win_rate_figure(lengths: Numbers, rewards: Numbers, reference: Numbers) -> Figure:
    """Plots the win rate, with its 95 % interval, of questions [N] in groups of similar length."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    groups = [rows for rows in np.array_split(lengths.argsort(kind="stable"), GROUPS) if len(rows)]
    for position, rows in enumerate(groups):
        won = wins(rewards[rows] - reference[rows])
        low, high = bootstrap(won.tolist())
        axes.errorbar([position], [won.mean()], [[won.mean() - low], [high - won.mean()]], fmt="o", color=POLICY)
    labels = [f"{lengths[rows].min():.0f} to {lengths[rows].max():.0f}" for rows in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.axhline(0.5, color="black", ls="--", lw=1)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("words of the question")
    axes.set_ylabel("win rate")
    _tidy(axes)
    return figure


def divergence_figure(answers: GatheredRows) -> Figure:
    """Plots reward, and judge if there is one, over the square root of the divergence, with best-of-n sampling.

    Gao et al. 2023 (arXiv 2210.10760) describe rewards of policies and of best-of-n sampling by this distance.
    """
    columns = answers.columns
    names = ["reward", *(["judge"] if is_known(columns["judge"]) else [])]
    baseline = list(best_of_n(answers))
    figure = Figure(figsize=(4.4 * len(names) + 0.4, 3.2), layout="constrained")
    for number, axes in enumerate(figure.subplots(1, len(names), squeeze=False)[0]):
        values = columns[names[number]]
        low, high = bootstrap(values.tolist())
        distance = sqrt(max(columns["kl"].mean(), 0))
        errors = [[values.mean() - low], [high - values.mean()]]
        axes.errorbar([distance], [values.mean()], errors, fmt="o", color=POLICY, label="policy")
        if baseline:
            distances = [sqrt(divergence) for _, divergence, *_ in baseline]
            rewards = [point[2 + number] for point in baseline]
            axes.plot(distances, rewards, color=REFERENCE, marker="s", markersize=4, label="best of n of the reference")
            for (count, *_), x, y in zip(baseline, distances, rewards, strict=True):
                axes.annotate(str(count), (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
        else:
            axes.plot([0], [columns[f"reference_{names[number]}"].mean()], "s", color=REFERENCE, label="reference")
        axes.set_xlabel("square root of the divergence per answer (nats)")
        axes.set_ylabel(names[number])
        _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
