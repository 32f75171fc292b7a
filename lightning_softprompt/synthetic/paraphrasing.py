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
        batch_size: Texts that are paraphrased at once. Sampled paraphrases depend on it.

    Raises:
        ValueError: If there are no texts, or a number is below 1.
    """

    texts: Sequence[str]
    answers: Sequence[str]
    count: int
    filter: ParaphraseFilter
    seed: int = 0
    request: str = REQUEST
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.texts or min(self.count, self.batch_size) < 1:
            raise ValueError(
                f"paraphrases require texts, and count and batch_size of at least 1, got {len(self.texts)} texts, "
                f"count={self.count} and batch_size={self.batch_size}"
            )

    def identity(self, generator: Generator) -> dict[str, Any]:
        """Returns what must be equal to continue an interrupted file."""
        return {
            "texts": sha256(json.dumps([self.texts, self.answers]).encode()).hexdigest()[:16],
            "backbone": generator.name,
            "count": self.count,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "request": self.request,
            "frame": generator.frame,
            "filter": asdict(self.filter),
            "decoding": dict(generator.decoding.options),
        }


def write_paraphrases(
    plan: ParaphrasePlan, generator: Generator, path: Path, report: Callable[[int], None] | None = None
) -> Counter[str]:
    """Writes one line for each text, with its paraphrases and the number of rejected ones by reason.

    The seed of a batch depends on its first text, so that an interrupted file is continued with the same lines.

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
        for start in range(0, len(plan.texts), plan.batch_size):
            stop = min(start + plan.batch_size, len(plan.texts))
            if stop <= num_complete:
                continue
            rows = paraphrase_batch(plan, generator, range(start, stop))
            lines = [f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows]
            file.write("".join(lines[max(0, num_complete - start) :]))
            file.flush()
            if report is not None:
                report(stop)
    partial.finish()
    counts: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        counts.update(row["rejected"])
        counts["accepted"] += len(row["paraphrases"])
    return counts


def paraphrase_batch(plan: ParaphrasePlan, generator: Generator, batch: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the texts of a batch, each with its accepted paraphrases and the number of rejected ones by reason."""
    texts = [plan.texts[number] for number in batch for _ in range(plan.count)]
    columns: list[Mapping[str, str]] = [{"text": text} for text in texts]
    written = generator(Step("paraphrase", plan.request), columns, derive_seed(plan.seed, batch[0]))
    cleaned = [clean_paraphrase(candidate.text) for candidate in written]
    before = measure_answers(plan, generator, batch, [plan.texts[number] for number in batch])
    after = measure_answers(plan, generator, [number for number in batch for _ in range(plan.count)], cleaned)
    rows = []
    for position, number in enumerate(batch):
        accepted: list[str] = []
        rejected: Counter[str] = Counter()
        for index in range(position * plan.count, (position + 1) * plan.count):
            old, new = before[position], after[index]
            drop = None if old is None or new is None else old - new
            reason = plan.filter.reason(texts[index], cleaned[index], written[index].is_finished, drop)
            if reason is None and cleaned[index] in accepted:
                reason = "repeated"
            if reason is None:
                accepted.append(cleaned[index])
            else:
                rejected[reason] += 1
        rows.append({"row": number, "text": plan.texts[number], "paraphrases": accepted, "rejected": dict(rejected)})
    return rows


def measure_answers(
    plan: ParaphrasePlan, generator: Generator, numbers: Sequence[int], instructions: Sequence[str]
) -> list[float | None]:
    """Returns the mean log-probability of the answers of texts after instructions; None for texts without an answer."""
    answers = [plan.answers[number] for number in numbers]
    return generator.mean_logprobs(ANSWER, [{"text": text} for text in instructions], answers)


def clean_paraphrase(text: str) -> str:
    """Returns a paraphrase without surrounding quotation marks.

    >>> clean_paraphrase('"Name a color."')
    'Name a color.'
    """
    stripped = text.strip()
    inner = stripped.removeprefix('"').removesuffix('"')
    is_quoted = stripped == f'"{inner}"' and '"' not in inner
    return inner.strip() if is_quoted else stripped
