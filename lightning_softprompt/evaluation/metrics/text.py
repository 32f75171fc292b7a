"""Metrics of generated texts: of one text beside its references, and of all texts of a split together.

Shares run from 0 to 1; papers print 100 times as much.
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
NISTS = range(1, 6)  # lengths of the n-grams of NIST


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; characters where a script writes no spaces.

    >>> words("Don't stop, Zoë!"), words("北京。")
    (['don', 't', 'stop', 'zoë'], ['北', '京'])
    """
    return split_words(unicodedata.normalize("NFC", text).lower())


def ngrams(tokens: Words, n: int) -> list[tuple[str, ...]]:
    """All stretches of n tokens in turn."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def rouge(
    prediction: str,
    references: Sequence[str],
    names: Sequence[str],
    stem: bool = True,
    letters: RougeWords = "ascii",
) -> dict[str, float]:
    """F1 of ROUGE (Lin 2004), the best over the references.

    Args:
        prediction: The text to score.
        references: The right texts.
        names: Of `rouge1` to `rouge9` and `rougeL`.
        stem: Whether words of more than three letters are cut to Porter's stem.
        letters: `ascii` makes words of a-z and 0-9, as in all published numbers: other letters are left out, and texts
            in other scripts score 0. `unicode` takes the words of every script, as `words` does.
    """
    keys = tuple(names)
    if not keys:
        return {}
    split: dict[str, Any] = {"normalizer": str, "tokenizer": words} if letters == "unicode" else {}
    found = rouge_score(prediction, list(references), "best", use_stemmer=stem, rouge_keys=keys, **split)
    return {name: float(found[f"{name}_fmeasure"]) for name in keys}


@final
class Rouge:
    """ROUGE as an evaluation computes it. It reports once that letters of the references are left out.

    Args:
        names: Of `rouge1` to `rouge9` and `rougeL`.
        stem: Whether words are cut to Porter's stem.
        letters: Which letters make words, as in `rouge`.

    Raises:
        ValueError: If `letters` is neither of its two values.
    """

    def __init__(self, names: Sequence[str], stem: bool = True, letters: RougeWords = "ascii") -> None:
        if letters not in ("ascii", "unicode"):
            raise ValueError(f"rouge_words must be ascii or unicode, got {letters!r}")
        self.names, self.stem, self.letters = tuple(names), stem, letters
        self._is_reported = letters == "unicode" or not names

    def __call__(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        """The scores of a text."""
        if not self._is_reported:
            self._report(references)
        return rouge(prediction, references, self.names, self.stem, self.letters)

    def _report(self, references: Sequence[str]) -> None:
        ignored = (word for text in references for word in text.split() if _has_other_letters(word))
        if word := next(ignored, None):
            log.warning(
                "ROUGE compares the letters a-z and digits only, so %r and its like lose letters or count for nothing; "
                "set rouge_words=unicode to compare the words of every script",
                word,
            )
            self._is_reported = True


def _has_other_letters(word: str) -> bool:
    return not word.isascii() and any(letter.isalnum() and not letter.isascii() for letter in word)


def novel_bigrams(prediction: str, source: str) -> float:
    """The share of a text's bigrams that its source lacks; not a number where it has none."""
    said, known = ngrams(words(prediction), 2), set(ngrams(words(source), 2))
    return sum(bigram not in known for bigram in said) / len(said) if said else math.nan


def repetition(prediction: str) -> float:
    """The share of a text's 4-grams that were there before, of its bigrams where it has fewer than 8 words.

    >>> repetition("on and on and on")
    0.5
    """
    said = words(prediction)
    grams = ngrams(said, 4 if len(said) >= 8 else 2)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def streams(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """References by row as sacrebleu takes them: the first of all rows, the second of all, None where there is none."""
    most = max(map(len, references))
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]  # type: ignore[misc]


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of a split (Papineni et al. 2002) as sacrebleu gives it (Post 2018), with its tokens and its smoothing."""
    return _sacrebleu("BLEU").corpus_score(predictions, streams(references)).score / 100  # type: ignore[no-any-return]


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The chrF of a split (Popović 2015) as sacrebleu gives it: n-grams of up to 6 letters, beta 2."""
    return _sacrebleu("CHRF").corpus_score(predictions, streams(references)).score / 100  # type: ignore[no-any-return]


def _sacrebleu(name: str) -> Any:
    import sacrebleu.metrics  # takes a moment, and classes need none of it

    return getattr(sacrebleu.metrics, name)()


def bootstrap_of_split(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of BLEU or chrF over rows (Koehn 2004), from sacrebleu's counts of each row.

    Its own resampling fails where a draw of rows scores nothing.
    """
    metric, generator = _sacrebleu(RESAMPLED[name]), np.random.default_rng(seed)
    counts = np.array(metric._extract_corpus_statistics(list(predictions), streams(references)))
    rows = len(counts)
    drawn = (counts[generator.integers(rows, size=rows)].sum(0).tolist() for _ in range(draws))
    scores = [float(metric._compute_score_from_stats(of).score) / 100 for of in drawn]
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST of a split (Doddington 2002) as `mteval-v13a` gives it: in bits, capitals made small.

    An n-gram weighs the information of its last word, by how often it stands in all references. It counts as often as
    it stands in one reference at most; lengths are compared with the references' mean.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()
    said = [split(text.lower()).split() for text in predictions]
    right = [[split(text.lower()).split() for text in row] for row in references]
    length = sum(sum(map(len, row)) / len(row) for row in right)
    information = _information([text for row in right for text in row])
    gains = (_gain(said, right, n, information) for n in NISTS)
    return _shortness(sum(map(len, said)) / length) * sum(gains) if length else 0.0


def _information(texts: Sequence[Words]) -> dict[tuple[str, ...], float]:
    counts = Counter(gram for text in texts for n in NISTS for gram in ngrams(text, n))
    counts[()] = sum(map(len, texts))
    return {gram: math.log2(counts[gram[:-1]] / count) for gram, count in counts.items() if gram}


def _gain(
    said: Sequence[Words], right: Sequence[Sequence[Words]], n: int, information: dict[tuple[str, ...], float]
) -> float:
    gained, total = 0.0, 0
    for text, row in zip(said, right, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in row:
            most |= Counter(ngrams(reference, n))
        grams = ngrams(text, n)
        gained += sum(information[gram] * count for gram, count in (Counter(grams) & most).items())
        total += len(grams)
    return gained / max(total, 1)


def _shortness(ratio: float) -> float:
    """What is left for texts that are too short: a half at two thirds of the length."""
    return math.exp(math.log(0.5) * (math.log(min(ratio, 1)) / math.log(1.5)) ** 2) if ratio else 0.0


ROUGES = (*(f"rouge{n}" for n in range(1, 10)), "rougeL")
BERTSCORE = "bertscore"
OF_ROWS = (*ROUGES, BERTSCORE)
OF_SPLITS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "bleu": bleu, "chrf": chrf, "nist": nist,
}  # fmt: skip
RESAMPLED = {"bleu": "BLEU", "chrf": "CHRF"}


def check_metrics(names: Sequence[str]) -> None:
    """Refuses what is no metric.

    Raises:
        ValueError: Naming those that there are.
    """
    if unknown := [name for name in names if name not in OF_ROWS and name not in OF_SPLITS]:
        raise ValueError(f"metrics names {unknown}, but there are {[*OF_ROWS, *OF_SPLITS]}")
