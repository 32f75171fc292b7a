"""The model card of a trained prompt: what it is, what it was trained on, how well it scores, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_softprompt.evaluation.metrics.intervals import share_interval
from lightning_softprompt.system.printable import html_text, one_line

Values = Mapping[str, Any]
SHARES = ("accuracy", "exact_match")  # metrics that are the share of rows with some property
DATA = ("path", "train", "validation", "template", "labels", "tags")  # arguments that describe the data

CARD = """\
# {title}

A soft prompt for `{backbone}`, trained with Lightning SoftPrompt {version}.

| | |
|---|---|
| method | {method} |
| backbone | {backbone} |
| fingerprint of the backbone | `{fingerprint}` |
| trainable parameters | {trainable} of {total} ({percent} %) |
| optimizer steps | {steps} |

## Data

{data}

## Validation

{metrics}

## Use

```bash
softprompt predict --config config.yaml --init_from {file} --data.predict FILE
```

The prompt only works with the backbone of this fingerprint. A file with other weights or another tokenizer is refused.
"""


def model_card(file: str, backbone: Values, method: Values, config: Values, report: Values, version: str) -> str:
    """The card as Markdown; texts from files are escaped.

    Args:
        file: Name of the prompt's file.
        backbone: Identity of the backbone: `name` and `fingerprint`.
        method: `_class_path` and arguments of the method.
        config: The config of the run.
        report: The contents of `metrics.json`.
        version: Version of the package.
    """
    trainable = report.get("trainable_parameters", 0)
    total = trainable + report.get("frozen_parameters", 0)
    return CARD.format(
        title=file.rpartition(".")[0] or file,
        version=version,
        file=file,
        method=_code(str(method.get("_class_path", "")).rpartition(".")[2]),
        backbone=_text(backbone.get("name")),
        fingerprint=backbone.get("fingerprint"),
        trainable=f"{trainable:,}",
        total=f"{total:,}",
        percent=f"{100 * trainable / total:.4f}" if total else "0",
        steps=report.get("global_step", 0),
        data=_describe_data(config.get("data") or {}),
        metrics=_describe_metrics(report),
    )


def _describe_data(data: Values) -> str:
    """The data module and the arguments that say which data it reads."""
    arguments = data.get("init_args") or {}
    rows = [("data module", _code(str(data.get("class_path", "")).rpartition(".")[2]))]
    rows += [(name, _code(arguments[name])) for name in DATA if arguments.get(name) is not None]
    if tasks := arguments.get("tasks"):
        rows.append(("tasks", ", ".join(_code(task) for task in tasks)))
    return _table(rows)


def _describe_metrics(report: Values) -> str:
    """The best validation, with an interval if the metric is a share of rows and their number is known."""
    best = report.get("best")
    if not best:
        return "No validation was run."
    value = _with_interval(best, report.get("validation_rows"))
    rows = [(_code(best["metric"]), value), ("at step", str(best["global_step"]))]
    return _table(rows)


def _with_interval(best: Values, rows: int | None) -> str:
    value = float(best["value"])
    is_share = str(best["metric"]).rpartition("/")[2] in SHARES
    if not is_share or not rows:
        return f"{value:.4f}"
    low, high = share_interval(value, rows)
    return f"{value:.4f} (95 % interval {low:.4f} to {high:.4f}, {rows} rows)"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _text(value: Any) -> str:
    """A text from outside on one line, without markup."""
    return html_text(one_line(value)).replace("|", "&#124;").replace("`", "&#96;")


def _code(value: Any) -> str:
    return f"<code>{_text(value)}</code>"
