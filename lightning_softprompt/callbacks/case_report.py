"""The rows of a test that came out best and worst, as a page for people."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.loggers import rank_zero_info
from lightning_softprompt.callbacks.predictions import targeted
from lightning_softprompt.callbacks.record_lines import of_all_processes
from lightning_softprompt.callbacks.run_files import stage_metrics
from lightning_softprompt.folders import write_whole
from lightning_softprompt.types import Batch

LONG, OPENING = 400, 120  # characters of an input that is folded, and of what is then seen of it
WORD = re.compile(r"(\w+)")
STYLE = """
:root { color-scheme: light dark; --line: #d5dae1; --soft: #5b6472; --mark: #fff0b3 }
@media (prefers-color-scheme: dark) { :root { --line: #3b424d; --soft: #9aa4b2; --mark: #5c4d10 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
article { border-top: 1px solid var(--line); padding: .6rem 0 }
h3, dt, summary, td { color: var(--soft) }
h3, dt { font-size: .85rem; font-weight: normal; margin: .4rem 0 0 }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: var(--mark); color: inherit }
th, td { text-align: left; font-weight: normal; padding-right: 1.5rem }
"""


class CaseReport(Callback):
    """Writes the best and the worst rows of `test` as one HTML page, if rows have scores of their own.

    Words that prediction and target share are marked. Rows without a finite score are left out.

    Args:
        path: The page.
        score: What ranks the rows; where they have no such score, the first they have does, its greatest being best.
        mode: Whether its least or its greatest value is best.
        rows: How many of the best, and of the worst.
    """

    def __init__(
        self, path: Path, score: str | None = None, mode: Literal["min", "max"] = "max", rows: int = 10
    ) -> None:
        self.path = Path(path)
        self.score, self.mode, self.rows = score, mode, rows
        self._cases: dict[int, Mapping[str, Any]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the test before."""
        self._cases = {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows that may be shown."""
        self._cases |= {record["row"]: record for record in outputs if record["scores"]}
        best, worst = self._ranked(self._cases)
        self._cases = {record["row"]: record for record in (*best, *worst)}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        cases = of_all_processes(self._cases)
        if not cases or not trainer.is_global_zero:
            return
        best, worst = ([targeted(trainer, "test", record) for record in part] for part in self._ranked(cases))
        page = html(self._by(cases)[0], stage_metrics(trainer, "test"), {"Best": best, "Worst": worst})
        write_whole(self.path, page.encode())
        rank_zero_info(f"the best and worst cases: {self.path}")

    def _by(self, cases: Mapping[int, Mapping[str, Any]]) -> tuple[str, int]:
        """The score that ranks the rows, and 1 where less of it is better, else -1."""
        names: Mapping[str, float] = next((record["scores"] for record in cases.values()), {})
        if self.score in names:
            return str(self.score), 1 if self.mode == "min" else -1
        return next(iter(names), ""), -1

    def _ranked(
        self, cases: Mapping[int, Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        """The best rows, best first, and of the others the worst, worst first."""
        name, sign = self._by(cases)
        finite = [record for record in cases.values() if math.isfinite(record["scores"].get(name, math.nan))]
        order = sorted(finite, key=lambda record: (sign * record["scores"][name], record["row"]))
        return order[: self.rows], order[self.rows :][: -self.rows - 1 : -1]


def html(score: str, metrics: Mapping[str, float], parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page: metrics, then each part's rows. It needs no other file."""
    title = f"Best and worst cases by {escape(score)}"
    rows = "".join(f"<tr><td>{escape(name)}</td><th>{value:.4g}</th></tr>" for name, value in sorted(metrics.items()))
    body = "".join(f"<h2>{name}</h2>{''.join(map(_case, part))}" for name, part in parts.items() if part)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    body = f"<h1>{title}</h1><table>{rows}</table>{body}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _case(record: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{escape(name)} {value}" for name, value in record["scores"].items())
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
