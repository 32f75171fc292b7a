"""Self-contained HTML pages, and rows of a test as HTML."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.result_table import metric_rows
from lightning_softprompt.system.printable import html_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG, PREVIEW = 400, 120  # characters above which a text is collapsed, and that then remain visible
SHOWN_METRICS, SHOWN_CLASSES = 4, 3  # the main metrics at the top of a page, and classes with their probability
MAX_TEXT = 600  # characters of a text in a table
MAX_PATH = 120  # characters of a path or name in a table that stays on one line
MAX_UNBROKEN = 36  # characters of a text in a table that stays on one line
WORD = re.compile(r"(\w+)")
STYLE = """
:root { color-scheme: light dark; --line: #d5dae1; --soft: #5b6472; --mark: #fff0b3 }
@media (prefers-color-scheme: dark) { :root { --line: #3b424d; --soft: #9aa4b2; --mark: #5c4d10 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
article { border-top: 1px solid var(--line); padding: .6rem 0 }
h1, h2, .note { overflow-wrap: anywhere }
h3, dt { font-size: .85rem; margin: .4rem 0 0 }
h3, dt, summary, .note { color: var(--soft) }
h3 { font-weight: normal }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: var(--mark); color: inherit }
nav a { margin-right: 1.2rem }
.wide { overflow: auto; max-height: 40rem }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.2rem .25rem 0 }
td { border-top: 1px solid var(--line); overflow-wrap: anywhere }
th { font-weight: 600; position: sticky; top: 0; background: Canvas }
td.short, th { white-space: nowrap }
td.long { min-width: 16rem }
img { max-width: 100% }
@media (prefers-color-scheme: dark) { img { filter: invert(.93) hue-rotate(180deg) } }
@media print { .wide { max-height: none } }
"""

Case = Mapping[str, Any]  # the record of a row, with its input


def cases_page(title: str, note: str, metrics: Mapping[str, float], parts: Mapping[str, Sequence[Case]]) -> str:
    """Returns a page with metrics and rows. Words shared by prediction and target are highlighted.

    Args:
        title: Title of the page.
        note: Text below the title.
        metrics: Values by full name, such as `test/f1`; the first ones are shown, the others are collapsed.
        parts: Rows by heading. Parts without rows are omitted.
    """
    rows = metric_rows(metrics, "test")
    body = f'<p class="note">{html_text(note)}</p>'
    body += table(["metric", "value"], rows[:SHOWN_METRICS])
    if rows[SHOWN_METRICS:]:
        others = table(["metric", "value"], rows[SHOWN_METRICS:])
        body += f"<details><summary>{len(rows) - SHOWN_METRICS} further metrics</summary>{others}</details>"
    shown = {heading: cases for heading, cases in parts.items() if cases}
    body += contents(list(shown))
    for heading, cases in shown.items():
        body += section(heading, "".join(map(_case, cases)))
    return page(title, body)


def page(title: str, body: str) -> str:
    """Returns a complete page.

    Args:
        title: Title and heading, as text.
        body: HTML.
    """
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html_text(title)}</title><style>{STYLE}</style>"
    body = f"<h1>{html_text(title)}</h1>{body}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def contents(titles: Sequence[str]) -> str:
    """Returns links to the sections of a page."""
    links = [f'<a href="#{anchor(title)}">{html_text(title)}</a>' for title in titles]
    return f"<nav>{' '.join(links)}</nav>"


def section(title: str, content: str, note: str = "") -> str:
    """Returns a part of a page, to which `contents` can link.

    Args:
        title: Heading, as text.
        content: HTML.
        note: Text below the heading.
    """
    heading = f'<h2 id="{anchor(title)}">{html_text(title)}</h2>'
    paragraph = f'<p class="note">{html_text(note)}</p>' if note else ""
    return f"{heading}{paragraph}{content}"


def anchor(title: str) -> str:
    """Returns the name of a section in links.

    >>> anchor("F1 by gold rank")
    'f1-by-gold-rank'
    """
    return "-".join(WORD.findall(title.casefold()))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table that scrolls if it is wide or high.

    Args:
        header: Names of the columns.
        rows: Cells; None is an empty value. Long texts are cut.
    """
    head = "".join(f"<th>{html_text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if value is None:
        value = "-"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if len(text) <= (MAX_PATH if text.isascii() and " " not in text else MAX_UNBROKEN):
        return f'<td class="short" dir="auto">{html_text(text)}</td>'
    shortened = text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
    return f'<td class="long" dir="auto">{html_text(shortened)}</td>'


def article(heading: str, entries: Mapping[str, str]) -> str:
    """Returns a row of a test as HTML.

    Args:
        heading: Heading, as text.
        entries: HTML by name; the names are text.
    """
    items = ""
    for name, entry in entries.items():
        items += f'<dt>{html_text(name)}</dt><dd dir="auto">{entry}</dd>'
    return f"<article><h3>{html_text(heading)}</h3><dl>{items}</dl></article>"


def image(description: str, figure: Figure) -> str:
    """Returns a figure as HTML that contains the image.

    Args:
        description: Alternative text.
        figure: The figure.
    """
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    encoded = b64encode(png.getvalue()).decode()
    return f'<p><img alt="{html_text(description)}" src="data:image/png;base64,{encoded}"></p>'


def _case(record: Case) -> str:
    scores = {name: value for name, value in record["scores"].items() if value is not None}
    names = list(scores)
    if record["prediction"] in scores:  # probabilities of classes
        names = sorted(scores, key=scores.__getitem__, reverse=True)[:SHOWN_CLASSES]
    texts = [f"{name} {scores[name]:.4g}" for name in names]
    heading = f"row {record['row']}: {', '.join(texts)}"
    prediction, target = record["prediction"], record["target"]
    entries = {"input": collapse(record["input"])}
    if record.get("passages"):
        entries = {"question": collapse(str(record.get("question") or ""))}
        passages = [f"<p>{highlight(passage['text'], target)}</p>" for passage in record["passages"]]
        entries["passages"] = f"<details><summary>{len(passages)} passages</summary>{''.join(passages)}</details>"
    entries["target"] = highlight(target, prediction)
    entries["prediction"] = highlight(prediction, target)
    return article(heading, entries)


def collapse(text: str, other: str = "") -> str:
    """Returns text as HTML, collapsed if it is long. Words that also occur in `other` are highlighted."""
    content = highlight(text, other)
    if len(text) <= LONG:
        return content
    return f"<details><summary>{html_text(text[:PREVIEW])} ...</summary>{content}</details>"


def highlight(text: str, other: str) -> str:
    """Returns text as HTML in which words that also occur in `other` are highlighted.

    >>> highlight("Dogs & cats", "the dogs")
    '<mark>Dogs</mark> &amp; cats'
    """
    shared = {word.casefold() for word in WORD.findall(other)}
    pieces = []
    for piece in WORD.split(text):  # words and what is between them
        escaped = html_text(piece)
        pieces.append(f"<mark>{escaped}</mark>" if piece.casefold() in shared else escaped)
    return "".join(pieces)
