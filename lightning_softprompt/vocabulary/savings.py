"""How many tokens of a corpus the first new tokens of an extended tokenizer save."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
from lightning_softprompt.vocabulary.corpus_texts import Piece
from lightning_softprompt.vocabulary.measurement import measure_tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 10  # numbers of new tokens that are measured


class Saving(NamedTuple):
    """Tokens of a corpus under a tokenizer with some of its new tokens.

    Args:
        rows: Number of new tokens.
        tokens: Tokens of the corpus.
    """

    rows: int
    tokens: int


def measure_savings(
    read: Callable[[], Iterable[Piece]], tokenizer: Any, rows: Sequence[AddedRow], points: int = POINTS
) -> Iterator[Saving]:
    """Yields the tokens of a corpus with the first new tokens, from none of them to all.

    New tokens are in the order in which they were added, the most rewarding ones first. Each point tokenizes the whole
    corpus with a tokenizer that `softprompt vocabulary extend` would write with fewer `--rows`.

    Args:
        read: Returns the corpus.
        tokenizer: The extended tokenizer.
        rows: Its new tokens.
        points: How many numbers of new tokens above 0 are measured.
    """
    numbers = sorted({round(len(rows) * point / points) for point in range(points + 1)})
    for number in numbers:
        shortened = remove_last_tokens(tokenizer, rows[number:])
        yield Saving(number, measure_tokenizer(read(), shortened).tokens)


def remove_last_tokens(tokenizer: Any, removed: Sequence[AddedRow]) -> Any:
    """Returns a copy of an extended tokenizer without its last new tokens."""
    if not removed:
        return tokenizer
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, first = rules["model"], removed[0].id
    if isinstance(model["vocab"], list):  # a unigram model lists its pieces by id
        model["vocab"] = model["vocab"][:first]
    else:
        model["vocab"] = {token: id for token, id in model["vocab"].items() if id < first}
    if "merges" in model:  # one merge per new token
        model["merges"] = model["merges"][: -len(removed)]
    shortened = deepcopy(tokenizer)
    shortened._tokenizer = Tokenizer.from_str(json.dumps(rules))
    return shortened


def draw_savings(savings: Sequence[Saving]) -> Figure:
    """Draws the share of tokens that new tokens save."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    before = savings[0].tokens
    shares = [100 * (before - saving.tokens) / max(1, before) for saving in savings]
    axes.plot([saving.rows for saving in savings], shares, marker="o")
    axes.set_xlabel("new tokens")
    axes.set_ylabel("tokens saved, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return figure
