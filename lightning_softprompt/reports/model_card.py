"""The model card of a trained prompt: what it is, what it was trained on, how well it scores, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lightning_softprompt.core.template import Template
from lightning_softprompt.system.printable import html_text, one_line, printable

Values = Mapping[str, Any]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # of a repository that a front matter can name

CARD = """\
---
library_name: lightning-softprompt
{base_model}tags: [soft-prompt]
---

# {title}

A soft prompt for `{backbone}`, trained with Lightning SoftPrompt {version}.

{facts}

## Rows

{rows}

## Data

{data}

## Validation

{metrics}

## Use

```python
import lightning_softprompt as sp

prompt = sp.load_prompt({file})
prompt.predict([{example})
```

The prompt only works with the backbone of this fingerprint. A file with other weights or another tokenizer is refused.
"""


def model_card(file: str, backbone: Values, method: Values, rows: Values, training: Values) -> str:
    """The card as Markdown, from the header of a prompt file; texts from files are escaped.

    Args:
        file: Name of the prompt's file.
        backbone: Identity of the backbone: `name`, `revision` and `fingerprint`.
        method: `_class_path` and arguments of the method.
        rows: How rows are written, by task.
        training: What is known of the training, see `SavedPrompt`.
    """
    name = str(backbone.get("name"))
    task, template = next(iter(_templates(method, rows).items()), ("", ""))
    return CARD.format(
        base_model=f"base_model: {name}\n" if HUB_NAME.fullmatch(name) else "",
        title=_text(file.rpartition(".")[0] or file),
        version=_text(training.get("version", "of an earlier version")),
        file=_literal(file),
        backbone=_text(name),
        facts=_table(_describe_method(backbone, method, training)),
        rows=_table(_describe_rows(method, rows, training)),
        data=_table(_describe_data(training.get("data") or {})),
        metrics=_describe_metrics(training.get("metrics") or {}),
        example=_example(template) + (f"], task={_literal(task)}" if task else "]"),
    )


def _describe_method(backbone: Values, method: Values, training: Values) -> list[tuple[str, str]]:
    parameters = training.get("parameters") or {}
    trainable = parameters.get("trainable", 0)
    total = trainable + parameters.get("frozen", 0)
    facts = [("method", _code(_class_name(method.get("_class_path")))), ("backbone", _text(backbone.get("name")))]
    facts += [("revision", _code(backbone["revision"]))] if backbone.get("revision") else []
    facts.append(("fingerprint of the backbone", _code(backbone.get("fingerprint"))))
    if total:
        facts.append(("trainable parameters", f"{trainable:,} of {total:,} ({100 * trainable / total:.4f} %)"))
    facts += [(name, _text(training[key])) for name, key in (("optimizer steps", "step"), ("seed", "seed"))
              if key in training]  # fmt: skip
    return facts


def _describe_rows(method: Values, rows: Values, training: Values) -> list[tuple[str, str]]:
    """The template, the readout and the label words, by task if there are several."""
    facts: list[tuple[str, str]] = []
    by_task = method.get("classes_by_task") or {"": method.get("classes")}
    for task, template in _templates(method, rows).items():
        of_task = f" of {_text(task)}" if task else ""
        facts.append((f"template{of_task}", _code(template.replace("\n", "\\n"))))
        for label, words in _words(by_task.get(task)).items():
            facts.append((f"class {_text(label)}{of_task}", ", ".join(_code(word) for word in words)))
    if training.get("readout"):
        facts.append(("readout", _code(training["readout"])))
    return facts


def _templates(method: Values, rows: Values) -> dict[str, str]:
    """The template of each task; files of version 0.1.0 store it with the classes only."""
    if not rows:
        template = _arguments(method.get("classes")).get("template")
        return {} if template is None else {"": str(template)}
    return {task: str(row_format.get("template")) for task, row_format in rows.items()}


def _words(classes: Any) -> Values:
    return _arguments(classes).get("words") or {}


def _arguments(value: Any) -> Values:
    """The arguments of an object as plain values; empty without one."""
    return value.get("init_args") or {} if isinstance(value, Mapping) else {}


def _example(template: str) -> str:
    """A row as Python code: a text, or a mapping with the columns of the template."""
    columns = Template(template).columns if template else ()
    if len(columns) < 2:
        return '"..."'
    return "{" + ", ".join(f'{_literal(name)}: "..."' for name in columns) + "}"


def _literal(text: str) -> str:
    """A text as a literal of Python in a block of code."""
    return json.dumps(printable(text)).replace("`", "\\x60")


def _describe_data(data: Values) -> list[tuple[str, str]]:
    """The data module, the arguments that say which data it reads, and their digest."""
    rows = [("data module", _code(_class_name(data.get("class_path"))))] if data.get("class_path") else []
    for name in data.keys() - {"class_path"}:
        values = data[name] if isinstance(data[name], list) else [data[name]]
        rows.append((_text(name), ", ".join(_code(value) for value in values)))
    return sorted(rows) or [("data", "unknown")]


def _describe_metrics(metrics: Values) -> str:
    """The metrics of the validation, with an interval if it is known."""
    if not metrics:
        return "No validation was run at this step."
    return _table([(_code(name), _with_interval(values)) for name, values in sorted(metrics.items())])


def _with_interval(values: Values) -> str:
    text = f"{float(values['value']):.4f}"
    if "low" not in values:
        return text
    return f"{text} (95 % interval {values['low']:.4f} to {values['high']:.4f}, {values['rows']} rows)"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _class_name(path: Any) -> str:
    return str(path).rpartition(".")[2]


def _text(value: Any) -> str:
    """A text from outside on one line, without markup."""
    return html_text(one_line(value)).replace("|", "&#124;").replace("`", "&#96;")


def _code(value: Any) -> str:
    return f"<code>{_text(value)}</code>"
