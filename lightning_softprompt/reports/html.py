"""Rows of a test as HTML, and whole pages of it, which need no other file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_softprompt.system.printable import html_text

LONG, OPENING = 400, 120  # characters of an input that is folded, and of what is then seen of it
WORD = re.compile(r"(\w+)")
STYLE = """
:root { color-scheme: light dark; --line: #d5dae1; --soft: #5b6472; --mark: #fff0b3 }
@media (prefers-color-scheme: dark) { :root { --line: #3b424d; --soft: #9aa4b2; --mark: #5c4d10 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
article { border-top: 1px solid var(--line); padding: .6rem 0 }
h3, dt { font-size: .85rem; margin: .4rem 0 0 }
h3, dt, summary, td { color: var(--soft) }
h3, th { text-align: left; font-weight: normal }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: var(--mark); color: inherit }
td { padding-right: 1.5rem }
img { max-width: 100% }
"""

Case = Mapping[str, Any]  # a record of a row, with its input


def html(score: str, metrics: Mapping[str, float], parts: Mapping[str, Sequence[Case]]) -> str:
    """Metrics, then the rows of each part. Words that prediction and target share are marked, long inputs folded."""
    rows = "".join(
        f"<tr><td>{html_text(name)}</td><th>{value:.4g}</th></tr>" for name, value in sorted(metrics.items())
    )
    body = "".join(f"<h2>{name}</h2>{''.join(map(_case, part))}" for name, part in parts.items() if part)
    return page(f"Best and worst cases by {score}", f"<table>{rows}</table>{body}")


def page(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: Text, which is its heading too.
        body: HTML.
    """
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html_text(title)}</title><style>{STYLE}</style>"
    body = f"<h1>{html_text(title)}</h1>{body}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def article(heading: str, entries: Mapping[str, str]) -> str:
    """A row: a heading and names, which are text, and what stands under each, which is HTML."""
    told = "".join(f'<dt>{html_text(name)}</dt><dd dir="auto">{entry}</dd>' for name, entry in entries.items())
    return f"<article><h3>{html_text(heading)}</h3><dl>{told}</dl></article>"


def _case(record: Case) -> str:
    scores = ", ".join(f"{name} {value}" for name, value in record["scores"].items() if value is not None)
    said, target = record["prediction"], record["target"]
    texts = {"input": folded(record["input"]), "target": marked(target, said), "prediction": marked(said, target)}
    return article(f"row {record['row']}: {scores}", texts)


def folded(text: str, other: str = "") -> str:
    """Text as HTML, folded where it is long; the words that another has too are marked."""
    if len(text) <= LONG:
        return marked(text, other)
    return f"<details><summary>{html_text(text[:OPENING])} ...</summary>{marked(text, other)}</details>"


def marked(text: str, other: str) -> str:
    """Text as HTML, in which the words that another has too are marked.

    >>> marked("Dogs & cats", "the dogs")
    '<mark>Dogs</mark> &amp; cats'
    """
    shared = {word.casefold() for word in WORD.findall(other)}
    pieces = ((piece, html_text(piece)) for piece in WORD.split(text))
    return "".join(f"<mark>{safe}</mark>" if piece.casefold() in shared else safe for piece, safe in pieces)
