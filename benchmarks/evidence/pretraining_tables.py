"""The table of continued pre-training and the lines of its claims, from `pretraining.jsonl`.

A document counts with its bits per byte, so that `comparisons.py` compares methods over documents and seeds.
A cloze question counts 1 if the likeliest of its candidates is the right one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from claims import Finding
from comparisons import Comparison, compare_rows

Result = Mapping[str, Any]
Spec = Mapping[str, Any]
BARE, MEDICAL, GENERAL, CLOZE = "bare", "medical", "general", "cloze"
CANDIDATES = 4  # of a cloze question; the first one is right
INTRODUCTION = """\
### Continued pre-training on medical text, SmolLM2-135M

`python benchmarks/evidence/pretraining.py --data DATA` runs these experiments, which
`benchmarks/evidence/pretraining.yaml` defines. Each method trains {steps} steps of {batch} windows of {window} bytes
of MedQuAD and PubMedQA; its learning rate has the best bits per byte of validation after {rate_steps} steps with
another seed. The test has {documents} documents of medical text, {others} articles of WikiText-2 and {questions}
cloze questions with {candidates} candidates about rare terms (chance {chance:.2f}). Bits per byte are means over
documents; a byte perplexity is 2 to their power. *Change* is relative to the bare backbone: below 0 on medical text
it is a gain, above 0 on general text it is forgetting. The domain effect is the change on medical text relative to
the same method trained on general text. Intervals of 95 % are a bootstrap over documents and seeds. Products are in
bfloat16. EWC measures the importance of {rows} windows of general text, SI that of {rate_steps} steps on general
text; both keep the weights close to the initial ones. Replay trains {replay} % of the batches on general text.
WikiText-2 has spaced punctuation, which every training on it adapts to.

The packaged encoder (MiniLM) is not in this table: its head for masked tokens is not part of the package. A head tied
to its embeddings would be a model that nobody has pre-trained, and its loss would measure the training of that head,
not what the encoder has learned or forgotten.
"""
HEADER = (
    "method", "seeds", "learning rate", "parameters", "medical bits per byte", "change", "general bits per byte",
    "change", "cloze", "domain effect",
)  # fmt: skip


def pretraining_table(results: Sequence[Result], config: Spec) -> Iterator[str]:
    """Yields the section of continued pre-training; nothing without the bare backbone."""
    if not select(results, BARE, MEDICAL):
        return
    bare = select(results, BARE, MEDICAL)[0]["documents"]
    yield INTRODUCTION.format(
        steps=config["steps"],
        rate_steps=config["rate_steps"],
        batch=config["batch_size"],
        window=config["window"],
        rows=config["importance_rows"],
        replay=round(100 * config["replay"]),
        documents=len(bare[MEDICAL]),
        others=len(bare[GENERAL]),
        questions=len(bare[CLOZE]) // CANDIDATES,
        candidates=CANDIDATES,
        chance=1 / CANDIDATES,
    )
    yield f"| {' | '.join(HEADER)} |"
    yield "|---" * len(HEADER) + "|"
    for method in config["methods"]:
        runs = select(results, method, MEDICAL)
        if runs:
            yield f"| {' | '.join(method_columns(method, runs, results))} |"
    yield ""


def method_columns(method: str, runs: Sequence[Result], results: Sequence[Result]) -> list[str]:
    """Returns the columns of a method."""
    first = runs[0]
    columns = [method, str(len(runs)), str(first["rate"] or "-"), f"{first['trainable_parameters']:,}"]
    bare = select(results, BARE, MEDICAL)
    for corpus in (MEDICAL, GENERAL):
        scores = scores_of(runs, corpus)
        change = "-" if method == BARE else describe(compare_rows(scores, scores_of(bare, corpus)))
        columns += [f"{scores.mean():.3f}", change]
    columns.append(f"{scores_of(runs, CLOZE).mean():.2f}")
    controls = select(results, method, GENERAL)
    effect = describe(compare_rows(scores_of(runs, MEDICAL), scores_of(controls, MEDICAL))) if controls else "-"
    return [*columns, effect]


def describe(comparison: Comparison) -> str:
    """Returns a difference with its interval."""
    return f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]"


def select(results: Sequence[Result], method: str, trained_on: str) -> list[Result]:
    """Returns the tested runs of a method that was trained on a corpus; of several runs with a seed, the last one."""
    by_seed = {
        result["seed"]: result
        for result in results
        if (result["method"], result["corpus"]) == (method, trained_on) and not result["selects_rate"]
    }
    return [by_seed[seed] for seed in sorted(by_seed)]


def scores_of(runs: Sequence[Result], corpus: str) -> np.ndarray:
    """Returns the bits per byte of each document, or whether each cloze question is answered, [S, R]."""
    score = cloze_scores if corpus == CLOZE else document_bits
    return np.array([score(run["documents"][corpus]) for run in runs])


def document_bits(documents: Sequence[Sequence[float]]) -> list[float]:
    """Returns the bits per byte of documents, given their nats and bytes.

    >>> document_bits([[math.log(2), 2]])
    [0.5]
    """
    return [nats / size / math.log(2) for nats, size in documents]


def cloze_scores(texts: Sequence[Sequence[float]]) -> list[float]:
    """Returns 1 for each question whose first text is the likeliest, given nats and bytes of all texts.

    >>> cloze_scores([[1.0, 9], [2.0, 9], [2.0, 9], [2.0, 9], [3.0, 9], [2.0, 9], [4.0, 9], [4.0, 9]])
    [1.0, 0.0]
    """
    nats = [of_text for of_text, _ in texts]
    questions = [nats[start : start + CANDIDATES] for start in range(0, len(nats), CANDIDATES)]
    return [float(right < min(wrong)) for right, *wrong in questions]


def measure_pretraining(claim: Spec, results: Sequence[Result], config: Spec) -> Finding:
    """Measures a claim that compares two methods on a corpus, such as `{method: LoRA, trained_on: general}`."""
    sides = [claim[name] for name in ("one", "other")]
    groups = [select(results, side["method"], side.get("trained_on", MEDICAL)) for side in sides]
    seeds = len(config["seeds"])
    planned = sum(1 if side["method"] == BARE else seeds for side in sides)
    runs = sum(len(group) for group in groups)
    if runs < planned:
        return Finding(runs, planned)
    one, other = (scores_of(group, claim["corpus"]) for group in groups)
    return Finding(runs, planned, compare_rows(one, other))
