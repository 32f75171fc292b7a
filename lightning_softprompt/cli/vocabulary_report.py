"""The tables that `softprompt vocabulary` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.vocabulary.corpus_texts import Piece
from lightning_softprompt.vocabulary.measurement import measure_tokenizer
from lightning_softprompt.vocabulary.savings import Saving
from lightning_softprompt.vocabulary.word_costs import WordCost, WordCosts, measure_words
from lightning_softprompt.vocabulary.word_counts import count_words

Read = Callable[[], Iterable[Piece]]  # returns the texts

MEASURES = {  # label: format, and the attribute whose change is printed
    "tokens": ("{m.tokens:,}", "tokens"),
    "tokens per word": ("{m.fertility:.3f}", "fertility"),
    "tokens per document": ("{m.tokens_per_document:.1f}", "tokens_per_document"),
    "bytes per token": ("{m.bytes_per_token:.3f}", "bytes_per_token"),
    "unknown tokens": ("{m.unknown_rate:.3%}", "unknown_rate"),
    "new tokens": ("{m.added:,}", None),
    "tokenization, MB per CPU second": ("{m.megabytes_per_second:.2f}", "megabytes_per_second"),
}
SPEEDS = {
    "tokens": ("{m.tokens:,}", "tokens"),
    "CPU seconds of a step over all texts": ("{m.seconds:.2f}", "seconds"),
    "tokens per CPU second": ("{m.tokens_per_second:,.0f}", "tokens_per_second"),
    "words per CPU second": ("{m.words_per_second:,.1f}", "words_per_second"),
    "bytes per CPU second": ("{m.bytes_per_second:,.0f}", "bytes_per_second"),
}
MOST_TOKENS = 6  # numbers of tokens of a word that are counted separately


def compare_tokenizers(tokenizers: Mapping[str, Any], read: Read, name: str, first_added: int | None) -> str:
    """Returns a table of the measures of tokenizers on texts.

    Args:
        tokenizers: The tokenizers by the name of their column.
        read: Returns the texts.
        name: Name of the texts.
        first_added: The first id that the base tokenizer does not have.
    """
    measured = [measure_tokenizer(read(), tokenizer, first_added) for tokenizer in tokenizers.values()]
    header = [f"{name} ({measured[0].documents:,} documents)", *tokenizers]
    return _compare(measured, MEASURES, header)


def _compare(measured: Sequence[Any], measures: Mapping[str, tuple[str, str | None]], header: list[str]) -> str:
    """Returns a table of measures, with their change if there are two columns."""
    rows = []
    for label, (form, attribute) in measures.items():
        row = [label, *(form.format(m=measurement) for measurement in measured)]
        if len(measured) > 1:
            row.append("" if attribute is None else _change(measured, attribute))
        rows.append(row)
    return table(rows, [*header, "change"] if len(measured) > 1 else header)


def _change(measured: Sequence[Any], attribute: str) -> str:
    before, after = map(attrgetter(attribute), measured)
    return f"{100 * (after - before) / before:+.2f} %" if before else ""


def describe_words(tokenizers: Mapping[str, Any], read: Read, limit: int) -> str:
    """Returns tables of the words by number of tokens, and of those that cost most tokens of the base tokenizer.

    Args:
        tokenizers: The tokenizers by the name of their column, the base tokenizer first.
        read: Returns the texts.
        limit: Maximum number of words.
    """
    costs = {}
    for name, tokenizer in tokenizers.items():
        costs[name] = measure_words(count_words(read(), tokenizer), tokenizer)
    shares = [_share_by_tokens(measured) for measured in costs.values()]
    labels = [*map(str, range(1, MOST_TOKENS)), f"{MOST_TOKENS} or more"]
    by_tokens = table([list(row) for row in zip(labels, *shares, strict=True)], ["tokens of a word", *costs])
    base = next(iter(costs.values()))
    total = max(1, sum(count * tokens for tokens, count in base.by_tokens.items()))
    tables = [by_tokens]
    if base.words:
        tables.append(_words_table("costliest words", base.words[:limit], total))
    unknown = [word for word in base.words if word.is_unknown]
    if unknown:
        unknown.sort(key=lambda word: -word.count)
        tables.append(_words_table("most frequent unknown words", unknown[:limit], total))
    return "\n\n".join(tables)


def _words_table(name: str, words: Sequence[WordCost], total: int) -> str:
    """Returns a table of words that are divided or unknown; `total` is the number of tokens of the texts."""
    rows = []
    for word in words:
        share = f"{100 * word.extra_tokens / total:.2f} %"
        unknown = "yes" if word.is_unknown else ""
        count, extra = f"{word.count:,}", f"{word.extra_tokens:,}"
        rows.append([word.text, count, str(word.tokens), extra, share, unknown])
    return table(rows, [name, "count", "tokens", "extra tokens", "of all tokens", "unknown"])


def _share_by_tokens(costs: WordCosts) -> list[str]:
    """Returns the share of words with 1, 2, .. tokens; the last one has `MOST_TOKENS` or more."""
    counts = [0] * MOST_TOKENS
    for tokens, count in costs.by_tokens.items():
        counts[min(max(tokens, 1), MOST_TOKENS) - 1] += count
    total = max(1, sum(counts))
    return [f"{100 * count / total:.1f} %" for count in counts]


def savings_table(savings: Sequence[Saving]) -> str:
    """Returns a table of the tokens of texts by the number of new tokens."""
    before = savings[0].tokens
    rows = []
    for saving in savings:
        share = 100 * (before - saving.tokens) / max(1, before)
        numbers = (saving.rows, saving.tokens, before - saving.tokens)
        rows.append([*(f"{number:,}" for number in numbers), f"{share:.2f} %"])
    return table(rows, ["first new tokens", "tokens", "saved", "saved"])


def compare_speed(base: str, vocabularies: Sequence[str | None], read: Read, rows: int) -> str:
    """Returns a table of the speed of training steps with the base tokenizer and with an extended one.

    Args:
        base: Name of the backbone.
        vocabularies: The folder of the tokenizer of each column; None for that of the backbone.
        read: Returns the texts.
        rows: Maximum number of parts of the texts.
    """
    from lightning_softprompt.backbones.loading import load_backbone
    from lightning_softprompt.core.backbone_spec import BackboneSpec
    from lightning_softprompt.vocabulary.step_speed import measure_speed, select_windows

    texts = select_windows(read(), rows)
    backbones = [load_backbone(BackboneSpec(base, vocabulary=vocabulary)) for vocabulary in vocabularies]
    names = ["base", "extended"][: len(backbones)]
    return _compare(measure_speed(backbones, texts), SPEEDS, [f"training steps ({len(texts):,} rows)", *names])
