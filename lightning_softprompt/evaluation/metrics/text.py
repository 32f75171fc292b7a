"""Metrics of generated text: of single texts and of whole corpora.

Scores are between 0 and 1; papers usually report them multiplied by 100.
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import numpy as np
from torchmetrics.functional.text.rouge import rouge_score

from lightning_softprompt.core.word_boundaries import split_words

log = logging.getLogger(__name__)
Words = Sequence[str]
RougeWords = Literal["ascii", "unicode"]
NIST_ORDERS = range(1, 6)  # lengths of n-grams


def words(text: str) -> list[str]:
    """Returns the lower-case words of a text without punctuation; characters for scripts without spaces.

    >>> words("Don't stop, Zoë!"), words("北京。")
    (['don', 't', 'stop', 'zoë'], ['北', '京'])
    """
    return split_words(unicodedata.normalize("NFC", text).lower())


def ngrams(tokens: Words, n: int) -> list[tuple[str, ...]]:
    """Returns all n-grams in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def rouge(
    prediction: str,
    references: Sequence[str],
    names: Sequence[str],
    stem: bool = True,
    letters: RougeWords = "ascii",
) -> dict[str, float]:
    """Returns the F1 of ROUGE (Lin 2004), the best over the references.

    Args:
        prediction: The text to score.
        references: The reference texts.
        names: Some of `rouge1` to `rouge9` and `rougeL`.
        stem: Whether to reduce words of more than three letters to their Porter stem.
        letters: `ascii` forms words of a-z and 0-9, as in published results: other letters are removed, and texts in
            other scripts score 0. `unicode` uses the words of all scripts, as `words` does.
    """
    keys = tuple(names)
    if not keys:
        return {}
    tokenization: dict[str, Any] = {"normalizer": str, "tokenizer": words} if letters == "unicode" else {}
    scores = rouge_score(prediction, list(references), "best", use_stemmer=stem, rouge_keys=keys, **tokenization)
    return {name: float(scores[f"{name}_fmeasure"]) for name in keys}


@final
class Rouge:
    """Computes ROUGE, and warns once if it ignores letters of the references.

    Args:
        names: Some of `rouge1` to `rouge9` and `rougeL`.
        stem: Whether to compare Porter stems.
        letters: Letters that form words, as in `rouge`.

    Raises:
        ValueError: If `letters` is neither of its two values.
    """

    def __init__(self, names: Sequence[str], stem: bool = True, letters: RougeWords = "ascii") -> None:
        if letters not in ("ascii", "unicode"):
            raise ValueError(f"rouge_words must be ascii or unicode, got {letters!r}")
        self.names, self.stem, self.letters = tuple(names), stem, letters
        self._is_reported = letters == "unicode" or not names

    def __call__(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        """Returns the scores of a text."""
        if not self._is_reported:
            self._report(references)
        return rouge(prediction, references, self.names, self.stem, self.letters)

    def _report(self, references: Sequence[str]) -> None:
        affected = [word for text in references for word in text.split() if _has_other_letters(word)]
        if affected:
            log.warning(
                "ROUGE compares only the letters a-z and digits, and ignores other letters, as in %r; set "
                "rouge_words=unicode to compare the words of all scripts",
                affected[0],
            )
            self._is_reported = True


def _has_other_letters(word: str) -> bool:
    return not word.isascii() and any(letter.isalnum() and not letter.isascii() for letter in word)


def novel_bigrams(prediction: str, source: str) -> float:
    """Returns the fraction of a text's bigrams that do not occur in its source; NaN if it has no bigrams."""
    bigrams = ngrams(words(prediction), 2)
    source_bigrams = set(ngrams(words(source), 2))
    return sum(bigram not in source_bigrams for bigram in bigrams) / len(bigrams) if bigrams else math.nan


def repetition(prediction: str) -> float:
    """Returns the fraction of a text's 4-grams (bigrams for fewer than 8 words) that repeat an earlier one.

    >>> repetition("on and on and on")
    0.5
    """
    tokens = words(prediction)
    grams = ngrams(tokens, 4 if len(tokens) >= 8 else 2)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def transpose_references(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns the n-th references of all rows for each n, as sacrebleu requires; None for missing ones."""
    most = max(map(len, references))
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]  # type: ignore[misc]


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns corpus BLEU (Papineni et al. 2002) with the tokenization and smoothing of sacrebleu (Post 2018)."""
    return _sacrebleu("BLEU").corpus_score(predictions, transpose_references(references)).score / 100  # type: ignore[no-any-return]


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns corpus chrF (Popović 2015) as computed by sacrebleu: character n-grams up to 6, beta 2."""
    return _sacrebleu("CHRF").corpus_score(predictions, transpose_references(references)).score / 100  # type: ignore[no-any-return]


def _sacrebleu(name: str) -> Any:
    import sacrebleu.metrics  # slow to import, and not needed for classification

    return getattr(sacrebleu.metrics, name)()


def bootstrap_corpus(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Returns the 95% percentile interval of BLEU or chrF over rows (Koehn 2004), from sacrebleu's counts of each row.

    The resampling of sacrebleu itself fails if a sample of rows scores 0.
    """
    metric, generator = _sacrebleu(RESAMPLED_METRICS[name]), np.random.default_rng(seed)
    counts = np.array(metric._extract_corpus_statistics(list(predictions), transpose_references(references)))
    rows = len(counts)
    samples = (counts[generator.integers(rows, size=rows)].sum(0).tolist() for _ in range(draws))
    scores = [float(metric._compute_score_from_stats(sample).score) / 100 for sample in samples]
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns corpus NIST (Doddington 2002) as computed by `mteval-v13a`: in bits, ignoring case.

    The weight of an n-gram is the information of its last word, from counts over all references. Its matches are
    limited to the highest count in one reference. The length penalty uses the mean length of the references.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()
    texts = [split(text.lower()).split() for text in predictions]
    reference_texts = [[split(text.lower()).split() for text in row] for row in references]
    length = sum(sum(map(len, row)) / len(row) for row in reference_texts)
    if not length:
        return 0.0
    information = _information([text for row in reference_texts for text in row])
    gains = (_gain(texts, reference_texts, n, information) for n in NIST_ORDERS)
    return _length_penalty(sum(map(len, texts)) / length) * sum(gains)


def _information(texts: Sequence[Words]) -> dict[tuple[str, ...], float]:
    counts = Counter(gram for text in texts for n in NIST_ORDERS for gram in ngrams(text, n))
    counts[()] = sum(map(len, texts))
    information = {}
    for gram, count in counts.items():
        if gram:
            information[gram] = math.log2(counts[gram[:-1]] / count)
    return information


def _gain(
    texts: Sequence[Words], references: Sequence[Sequence[Words]], n: int, information: dict[tuple[str, ...], float]
) -> float:
    """Returns the mean information of the matching n-grams."""
    gained, total = 0.0, 0
    for text, row in zip(texts, references, strict=True):
        limits: Counter[tuple[str, ...]] = Counter()
        for reference in row:
            limits |= Counter(ngrams(reference, n))
        grams = ngrams(text, n)
        matches = Counter(grams) & limits
        gained += sum(information[gram] * count for gram, count in matches.items())
        total += len(grams)
    return gained / max(total, 1)


def _length_penalty(ratio: float) -> float:
    """Returns the factor for texts that are too short: 0.5 at two thirds of the reference length."""
    if not ratio:
        return 0.0
    shortness = math.log(min(ratio, 1)) / math.log(1.5)
    return math.exp(math.log(0.5) * shortness**2)


ROUGES = (*(f"rouge{n}" for n in range(1, 10)), "rougeL")
BERTSCORE = "bertscore"
ROW_METRICS = (*ROUGES, BERTSCORE)
CORPUS_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "bleu": bleu, "chrf": chrf, "nist": nist,
}  # fmt: skip
RESAMPLED_METRICS = {"bleu": "BLEU", "chrf": "CHRF"}


def check_metrics(names: Sequence[str]) -> None:
    """Checks the names of metrics.

    Raises:
        ValueError: If a metric is unknown.
    """
    available = [*ROW_METRICS, *CORPUS_METRICS]
    unknown = [name for name in names if name not in available]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}; available are {available}")
