"""Rows of a test as one HTML page, which needs no other file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

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
"""

Case = Mapping[str, Any]  # a record of a row, with its input


def html(score: str, metrics: Mapping[str, float], parts: Mapping[str, Sequence[Case]]) -> str:
    """Metrics, then the rows of each part. Words that prediction and target share are marked, long inputs folded."""
    title = f"Best and worst cases by {escape(score)}"
    rows = "".join(f"<tr><td>{escape(name)}</td><th>{value:.4g}</th></tr>" for name, value in sorted(metrics.items()))
    body = "".join(f"<h2>{name}</h2>{''.join(map(_case, part))}" for name, part in parts.items() if part)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    body = f"<h1>{title}</h1><table>{rows}</table>{body}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _case(record: Case) -> str:
    scores = ", ".join(f"{escape(name)} {value}" for name, value in record["scores"].items() if value is not None)
    said, target = record["prediction"], record["target"]
    texts = {"input": _folded(record["input"]), "target": marked(target, said), "prediction": marked(said, target)}
    entries = "".join(f'<dt>{name}</dt><dd dir="auto">{text}</dd>' for name, text in texts.items())
    return f"<article><h3>row {record['row']}: {scores}</h3><dl>{entries}</dl></article>"


def _folded(text: str) -> str:
    if len(text) <= LONG:
        return escape(text)
    return f"<details><summary>{escape(text[:OPENING])} ...</summary>{escape(text)}</details>"


def marked(text: str, other: str) -> str:
    """Text as HTML, in which the words that another has too are marked.

    >>> marked("Dogs & cats", "the dogs")
    '<mark>Dogs</mark> &amp; cats'
    """
    shared = {word.casefold() for word in WORD.findall(other)}
    pieces = ((piece, escape(piece)) for piece in WORD.split(text))
    return "".join(f"<mark>{safe}</mark>" if piece.casefold() in shared else safe for piece, safe in pieces)
