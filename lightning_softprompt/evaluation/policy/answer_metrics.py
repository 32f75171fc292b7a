"""Summaries of rewards of answers, and comparisons with the answers of a reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.text_rows import GatheredRows, Numbers

REWARD, JUDGE = 0, 1  # position of the values of a sampled answer of the reference


def summarize_answers(answers: GatheredRows, names: Sequence[str]) -> dict[str, float]:
    """Returns the means of columns that are known, and of the parts of the reward.

    Args:
        answers: The answers, with texts of the form `{"parts": {name: value}}`.
        names: Names of the columns.
    """
    metrics = {name: float(answers.columns[name].mean()) for name in names if is_known(answers.columns[name])}
    for name in answers.texts[0]["parts"]:
        metrics[f"reward_{name}"] = float(np.mean([row["parts"][name] for row in answers.texts]))
    return metrics


def compare_answers(answers: GatheredRows) -> dict[str, float]:
    """Returns how the answers differ from those of the reference, with intervals over questions.

    Args:
        answers: The answers, with texts of the form `{"samples": [[reward, judge], ...]}` of the reference.
    """
    columns = answers.columns
    metrics: dict[str, float] = {}
    values = {"reward": columns["reward"]}
    for name, prefix in (("reward", ""), ("judge", "judge_")):
        differences = columns[name] - columns[f"reference_{name}"]
        if is_known(differences):
            metrics[f"reference_{name}"] = float(columns[f"reference_{name}"].mean())
            values |= {f"{prefix}lift": differences, f"{prefix}win_rate": wins(differences)}
    if is_known(columns["judge"]):
        values["judge"] = columns["judge"]
    if is_known(columns["kl"]):
        tokens = columns["tokens"].sum()
        metrics["kl_per_token"] = float(columns["kl"].sum() / tokens)
        metrics["entropy"] = float(-columns["logprob"].sum() / tokens)
        metrics["kl_k3"] = float(columns["kl_k3"].mean())
        values["kl"] = columns["kl"]
    for name in ("reference_words", "reference_finished"):
        metrics[name] = float(columns[name].mean())
    for name, of_questions in values.items():
        metrics[name] = float(of_questions.mean())
        metrics[f"{name}_low"], metrics[f"{name}_high"] = bootstrap(of_questions.tolist())
    for count, _, reward, _ in best_of_n(answers):
        metrics[f"best_of_{count}"] = reward
    return metrics


def is_known(values: Numbers) -> bool:
    """Whether values contain no NaN, which stands for a value that was not computed."""
    return not np.isnan(values).any()


def wins(differences: Numbers) -> Numbers:
    """Returns 1 for each difference above 0, one half for 0, and 0 for others.

    >>> wins(np.array([0.2, 0.0, -1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (np.sign(differences) + 1) / 2


def best_of_n(answers: GatheredRows) -> Iterator[tuple[int, float, float, float]]:
    """Yields n, the divergence log n - (n - 1) / n, and mean reward and judgement of the best of n answers.

    The divergence is that of best-of-n sampling from the reference (Stiennon et al. 2020, arXiv 2009.01325, appendix
    G.3). n is 1, 2, 4 and so on, up to the number of sampled answers.
    """
    samples = np.array([row["samples"] for row in answers.texts])  # [questions, answers, 2]
    count = 1
    while count <= samples.shape[1] and samples.shape[1] > 1:
        chosen = np.mean([expected_best(of_question, count) for of_question in samples], axis=0)
        yield count, math.log(count) - (count - 1) / count, float(chosen[REWARD]), float(chosen[JUDGE])
        count *= 2


def expected_best(samples: Numbers, count: int) -> Numbers:
    """Returns the expected values of the answer with the highest reward among `count` of the samples.

    The mean is over all subsets of that size: in ascending order of rewards, sample i of N is the best of
    C(i - 1, n - 1) subsets.

    Args:
        samples: Rewards and further values [N, values].
        count: Size n of the subsets.

    >>> expected_best(np.array([[1.0, 5.0], [3.0, 7.0]]), 2).tolist()
    [3.0, 7.0]
    """
    ordered = samples[samples[:, REWARD].argsort(kind="stable")]
    subsets = [math.comb(rank, count - 1) for rank in range(len(samples))]
    weights = np.array(subsets) / math.comb(len(samples), count)
    return np.asarray(weights @ ordered)
