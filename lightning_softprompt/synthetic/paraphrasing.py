"""Paraphrases of texts by the frozen model, and the filters that reject most of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning_softprompt.evaluation.metrics.text import rouge
from lightning_softprompt.retrieval.search.encoder import Encoder, load_encoder
from lightning_softprompt.synthetic.generator import Generator, derive_seed
from lightning_softprompt.synthetic.writers.base import Step
from lightning_softprompt.system.partial_file import PartialFile

REQUEST = "Rewrite this text in other words. Keep its meaning, and write only the new text.\n\n{text}"
ANSWER = Step("answer", "{text}")  # the answer after the text as an instruction


@dataclass(frozen=True)
class ParaphraseFilter:
    """Rejects paraphrases that are too different from their text, too similar to it, or change what is asked.

    Args:
        low_length: Least number of words, relative to the text.
        high_length: Most number of words, relative to the text.
        low_overlap: Least ROUGE-L F1 with the text.
        high_overlap: Highest ROUGE-L F1 with the text.
        max_drop: Highest loss of log-probability of the row's answer after the paraphrase instead of the text, in nats
            per token; it applies to rows with an answer.
        min_cosine: Least cosine of the embeddings of text and paraphrase; None for no such limit.
        encoder: The encoder of these embeddings.

    Raises:
        ValueError: If a range is empty.
    """

    low_length: float = 0.5
    high_length: float = 2.0
    low_overlap: float = 0.2
    high_overlap: float = 0.8
    max_drop: float = 0.5
    min_cosine: float | None = None
    encoder: str = "all-minilm-l6-v2"

    def __post_init__(self) -> None:
        if self.low_length > self.high_length or self.low_overlap > self.high_overlap:
            raise ValueError(
                f"a low limit exceeds a high one: length {self.low_length} to {self.high_length}, overlap "
                f"{self.low_overlap} to {self.high_overlap}"
            )

    def reason(self, text: str, paraphrase: str, is_finished: bool, drop: float | None) -> str | None:
        """Returns why a paraphrase is rejected; None if it is not.

        Args:
            text: The text.
            paraphrase: The paraphrase.
            is_finished: Whether the model ended it, rather than the limit of tokens.
            drop: Loss of log-probability of the answer, in nats per token; None without an answer.
        """
        if not paraphrase or not is_finished:
            return "unfinished" if paraphrase else "empty"
        ratio = len(paraphrase.split()) / max(1, len(text.split()))
        if not self.low_length <= ratio <= self.high_length:
            return "length"
        overlap = rouge(paraphrase, [text], ["rougeL"], letters="unicode")["rougeL"]
        if not self.low_overlap <= overlap <= self.high_overlap:
            return "overlap"
        if drop is not None and drop > self.max_drop:
            return "likelihood"
        if self.min_cosine is not None and self._cosine(text, paraphrase) < self.min_cosine:
            return "cosine"
        return None

    @cached_property
    def _encoder(self) -> Encoder:
        return load_encoder(self.encoder)

    def _cosine(self, text: str, paraphrase: str) -> float:
        one, other = self._encoder.passages([text, paraphrase])
        lengths = float((one @ one) * (other @ other)) ** 0.5
        return float(one @ other) / lengths


@dataclass(frozen=True)
class ParaphrasePlan:
    """Which texts are paraphrased.

    Args:
        texts: The texts, each once.
        answers: The answer of each text; empty if it has none.
        count: Paraphrases that the model writes for each text, before the filter.
        filter: Rejects paraphrases.
        seed: Seed of sampling.
        request: What the model is asked for, with `{text}`.

    Raises:
        ValueError: If there are no texts or no paraphrases are asked for.
    """

    texts: Sequence[str]
    answers: Sequence[str]
    count: int
    filter: ParaphraseFilter
    seed: int = 0
    request: str = REQUEST

    def __post_init__(self) -> None:
        if not self.texts or self.count < 1:
            raise ValueError(f"paraphrases require texts and a count of at least 1, got {self.count}")

    def identity(self, generator: Generator) -> dict[str, Any]:
        """Returns what must be equal to continue an interrupted file."""
        return {
            "texts": sha256(json.dumps([self.texts, self.answers]).encode()).hexdigest()[:16],
            "backbone": generator.name,
            "count": self.count,
            "seed": self.seed,
            "request": self.request,
            "frame": generator.frame,
            "filter": asdict(self.filter),
            "decoding": dict(generator.decoding.options),
        }


def write_paraphrases(
    plan: ParaphrasePlan, generator: Generator, path: Path, report: Callable[[int], None] | None = None
) -> Counter[str]:
    """Writes one line for each text, with its paraphrases and the number of rejected ones by reason.

    The lines of a text depend only on the text and the seed, so that an interrupted file is continued with the same
    lines.

    Args:
        plan: The texts.
        generator: Writes the paraphrases.
        path: The file. While it is incomplete, its name ends with `.part`.
        report: Is called with the number of texts that are complete.

    Returns:
        The number of paraphrases by reason of rejection, and of accepted ones as `accepted`.
    """
    partial = PartialFile(path)
    file, num_complete = partial.open(plan.identity(generator))
    with file:
        for number in range(num_complete, len(plan.texts)):
            row = paraphrase(plan, generator, plan.texts[number], plan.answers[number])
            file.write(f"{json.dumps({'row': number, **row}, ensure_ascii=False)}\n")
            file.flush()
            if report is not None:
                report(number + 1)
    partial.finish()
    counts: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        counts.update(row["rejected"])
        counts["accepted"] += len(row["paraphrases"])
    return counts


def paraphrase(plan: ParaphrasePlan, generator: Generator, text: str, answer: str) -> dict[str, Any]:
    """Returns a text with its accepted paraphrases, and the number of rejected ones by reason."""
    step = Step("paraphrase", plan.request)
    columns: list[Mapping[str, str]] = [{"text": text}] * plan.count
    written = generator(step, columns, derive_seed(plan.seed, text))
    cleaned = [clean_paraphrase(candidate.text) for candidate in written]
    drops: list[float | None] = [None] * plan.count
    if answer:
        questions: list[Mapping[str, str]] = [{"text": question} for question in (text, *cleaned)]
        before, *after = generator.mean_logprobs(ANSWER, questions, [answer] * len(questions))
        drops = [None if before is None or value is None else before - value for value in after]
    accepted: list[str] = []
    rejected: Counter[str] = Counter()
    for candidate, paraphrased, drop in zip(written, cleaned, drops, strict=True):
        reason = plan.filter.reason(text, paraphrased, candidate.is_finished, drop)
        if reason is None and paraphrased in accepted:
            reason = "repeated"
        if reason is None:
            accepted.append(paraphrased)
        else:
            rejected[reason] += 1
    return {"text": text, "paraphrases": accepted, "rejected": dict(rejected)}


def clean_paraphrase(text: str) -> str:
    """Returns a paraphrase without surrounding quotation marks.

    >>> clean_paraphrase('"Name a color."')
    'Name a color.'
    """
    stripped = text.strip()
    inner = stripped.removeprefix('"').removesuffix('"')
    is_quoted = stripped == f'"{inner}"' and '"' not in inner
    return inner.strip() if is_quoted else stripped
