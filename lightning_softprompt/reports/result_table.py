"""The metrics of an evaluation as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_softprompt.reports.text_table import table

FIRST = (
    "accuracy",
    "f1",
    "exact_match",
    "rougeL",
    "rouge1",
    "rouge2",
    "macro_f1",
    "mcc",
    "loss",
)  # the main metrics of the tasks
COLUMN_NAMES = {"predicted": "share predicted", "lead": "first words of the source, as a baseline"}
MAX_ROWS = 20  # classes or replicas in the second table


def format_metrics(metrics: Mapping[str, float], stage: str) -> str:
    """Returns one line per metric, with its interval, and a table of the metrics per class, task or replica.

    The cross-entropy is left out if it equals the loss, as with most objectives.

    Args:
        metrics: Values by full name, such as `test/f1`; the bounds of an interval are `test/f1_low`, `test/f1_high`.
        stage: The prefix of the names.

    >>> print(format_metrics({"test/f1": 0.51234, "test/f1_low": 0.4, "test/f1_high": 0.6, "test/f1/pos": 0.5}, "test"))
    f1  0.5123 [0.4000, 0.6000]
    <BLANKLINE>
         f1
    ---  ------
    pos  0.5000
    """
    values = {name.removeprefix(f"{stage}/"): value for name, value in metrics.items()}
    texts = {name: text for name, text in metric_rows(metrics, stage) if "/" not in name}
    texts.pop("generated", None)  # a number of rows is no score
    if texts.get("cross_entropy") == texts.get("loss"):
        texts.pop("cross_entropy", None)
    blocks = [table([[name, text] for name, text in texts.items()])]
    parts = [name.split("/", 1) for name in values if "/" in name and not _is_bound(name, values)]
    if parts:
        blocks.append(_table_of_parts(parts, values))
    return "\n\n".join(block for block in blocks if block)


def metric_rows(metrics: Mapping[str, float], stage: str) -> list[list[str]]:
    """Returns the name and the value of each metric, with its interval: the main ones first, those of parts last.

    Args:
        metrics: See `format_metrics`.
        stage: The prefix of the names.

    >>> metric_rows({"test/f1": 0.5, "test/f1_low": 0.4, "test/f1_high": 0.6}, "test")
    [['f1', '0.5000 [0.4000, 0.6000]']]
    """
    values = {name.removeprefix(f"{stage}/"): value for name, value in metrics.items()}
    names = [name for name in values if not _is_bound(name, values)]
    order = {name: number for number, name in enumerate(FIRST)}
    names.sort(key=lambda name: ("/" in name, order.get(name, len(order)), name))
    return [[name, _with_interval(name, values)] for name in names]


def _is_bound(name: str, values: Mapping[str, float]) -> bool:
    """Whether a metric is the lower or upper bound of another one."""
    base = name.removesuffix("_low").removesuffix("_high")
    return base != name and base in values


def _with_interval(name: str, values: Mapping[str, float]) -> str:
    text = f"{values[name]:.4f}"
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    if low is None or high is None:
        return text
    return f"{text} [{low:.4f}, {high:.4f}]"


def _table_of_parts(parts: Sequence[Sequence[str]], values: Mapping[str, float]) -> str:
    """A row for each class, task or replica, and a column for each of their metrics."""
    metrics = list(dict.fromkeys(metric for metric, _ in parts))
    names = list(dict.fromkeys(name for _, name in parts))
    rows = []
    for name in names[:MAX_ROWS]:
        metrics_of_part = [f"{metric}/{name}" for metric in metrics]
        rows.append([name, *(_with_interval(metric, values) if metric in values else "" for metric in metrics_of_part)])
    text = table(rows, ["", *(COLUMN_NAMES.get(name, name) for name in metrics)])
    if len(names) > MAX_ROWS:
        text += f"\n... and {len(names) - MAX_ROWS} more, in metrics.json"
    return text
