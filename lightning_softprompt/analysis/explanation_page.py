"""The tables and the HTML page of `softprompt explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lightning_softprompt.analysis.attention_summary import (
    OTHERS,
    PARTS,
    QUESTION,
    RELEVANT,
    conditions_of,
    heads_by_relevance,
    lift,
    masses_by_layer,
    masses_by_position,
    mean_tokens,
)
from lightning_softprompt.analysis.explanation import GENERATED, MEASURES, RIGHT, Explanation
from lightning_softprompt.analysis.passage_effects import (
    BARE,
    OTHER_QUESTION,
    REVERSED,
    RUN,
    SOFT_TOKENS,
    AnswerEffects,
    passage_masses,
)
from lightning_softprompt.analysis.shapley import MAX_EXACT
from lightning_softprompt.reports.html import article, collapse, contents, image, page, section, table
from lightning_softprompt.system.printable import html_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[list[str]]
Summary = Mapping[str, Mapping[str, Mapping[str, Any]]]  # of a measure, by answer and name
BAR_LENGTH = 6  # characters of the longest bar of a row
NUM_HEADS = 5  # shown heads
NUM_PAIRS = 3  # shown pairs of passages of a row
EFFECTS_NOTE = (
    "An effect is a difference of log p(answer) in nats: 0.7 doubles the probability of the answer. The Shapley value "
    "of a passage is its mean effect over all subsets of the other passages; leave-one-out is its effect in addition "
    "to all others. The interaction of two passages is how much their joint effect exceeds the sum of both; it is "
    f"below 0 if one replaces the other. For more than {MAX_EXACT} passages, a sparse linear model of random subsets "
    "replaces the Shapley value. A passage is relevant if it is of a gold document or contains the right answer. "
    "Intervals are 95 % bootstrap intervals over rows, which are too narrow for fewer than about 20 rows."
)
ATTENTION_NOTE = (
    "Attention of the positions that predict the generated answer, as means over heads, answer tokens and rows. "
    "Attention shows where a position looks, not what determines the answer: interpret it only together with the "
    "effects of passages, and if it differs between the conditions. The conditions are the rows of the run, the "
    "passages in reversed order, the question of another row, and the model without the prompt. The lift is the mass "
    "divided by the share of tokens; tokens at the start of rows, which have much attention in each row, do not count."
)
POSITION_NOTE = (
    "If the first position has most attention in both orders, the attention depends on the position of a passage and "
    "not on its content."
)
CONDITION_NAMES = {RUN: "run", REVERSED: "passages reversed", OTHER_QUESTION: "other question", BARE: "without prompt"}
HEADS_NOTE = (
    "The heads with most attention to relevant passages, as means over rows that have relevant and other passages. A "
    "head that selects by content attends to them in both orders of the passages."
)
COLORS = {SOFT_TOKENS: "#d95f02", RELEVANT: "#1b9e77", OTHERS: "#7570b3", QUESTION: "#444444"}


def measure_rows(summary: Summary) -> tuple[list[str], Rows]:
    """Returns header and rows of the table of measures."""
    rows = []
    for name, description in MEASURES.items():
        generated, right = summary[GENERATED].get(name), summary[RIGHT].get(name)
        if generated or right:
            rows.append([name, _mean_and_interval(generated), _mean_and_interval(right), description])
    return ["measure", "generated answer", "right answer", "meaning"], rows


def _mean_and_interval(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "-"
    mean, low, high = (f"{values[key]:.3f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}] ({values['rows']} rows)"


def comparison_rows(comparison: Summary) -> tuple[list[str], Rows]:
    """Returns header and rows of the table of differences from the other run."""
    rows = []
    for answer in (GENERATED, RIGHT):
        for name, values in comparison[answer].items():
            difference, low, high = (f"{values[key]:+.3f}" for key in ("difference", "low", "high"))
            this, other = (f"{values[run]:.3f}" for run in ("this", "other"))
            rows.append([answer, name, this, other, f"{difference} [{low}, {high}]", str(values["rows"])])
    return ["answer", "measure", "this run", "other run", "difference [95 % interval]", "rows"], rows


def attention_rows(explanations: Sequence[Explanation]) -> tuple[list[str], Rows]:
    """Returns header and rows of the attention to each part under each condition."""
    conditions = conditions_of(explanations)
    num_tokens = mean_tokens(explanations)
    masses: dict[str, dict[str, float]] = {}
    for condition in conditions:
        masses[condition] = {}
        for part, by_layer in masses_by_layer(explanations, condition).items():
            masses[condition][part] = sum(by_layer) / len(by_layer)
    lifts = lift(masses[RUN], num_tokens)
    rows = []
    for part in PARTS:
        if part in masses[RUN] and num_tokens[part]:
            by_condition = [f"{masses[condition].get(part, 0.0):.3f}" for condition in conditions]
            lift_of_part = f"{lifts[part]:.2f}" if part in lifts else "-"
            rows.append([part, f"{num_tokens[part]:.1f}", *by_condition, lift_of_part])
    return ["part", "tokens", *(CONDITION_NAMES[name] for name in conditions), "lift"], rows


def position_rows(explanations: Sequence[Explanation]) -> tuple[list[str], Rows]:
    """Returns header and rows of the attention to the passage at each position under each condition."""
    conditions = conditions_of(explanations)
    columns = [masses_by_position(explanations, name, name == REVERSED) for name in conditions]
    rows = []
    for position, masses in enumerate(zip(*columns, strict=True), start=1):
        rows.append([str(position), *(f"{mass:.3f}" for mass in masses)])
    return ["position", *(CONDITION_NAMES[name] for name in conditions)], rows


def head_rows(explanations: Sequence[Explanation]) -> tuple[list[str], Rows]:
    """Returns header and rows of the heads with most attention to relevant passages."""
    rows = []
    for head in heads_by_relevance(explanations)[:NUM_HEADS]:
        masses = [f"{mass:.3f}" for mass in (head.relevant, head.relevant_reversed, head.others)]
        rows.append([str(head.layer), str(head.head), *masses])
    return ["layer", "head", RELEVANT, f"{RELEVANT}, reversed", OTHERS], rows


def explanation_page(
    name: str,
    explanations: Sequence[Explanation],
    summary: Summary,
    comparison: Summary | None,
    num_examples: int,
    note: str,
) -> str:
    """Returns the page.

    Args:
        name: Name of the run.
        explanations: The explained rows.
        summary: The result of `summarize`.
        comparison: The result of `compare`; None without another run.
        num_examples: Maximum number of rows to show; the first ones are shown.
        note: Text below the title.
    """
    title = "Effects of passages"
    header, rows = measure_rows(summary)
    content = table(header[:-1], [row[:-1] for row in rows]) + _definitions(rows)
    sections = {title: section(title, content, EFFECTS_NOTE)}
    if any(any(explanation.is_relevant) for explanation in explanations):
        sections[title] += image("effect of each passage on both answers", effects_figure(explanations))
    if comparison is not None:
        title = "Compared with the other run"
        sections[title] = section(
            title, table(*comparison_rows(comparison)), "Paired by row; this run minus the other."
        )
    if conditions_of(explanations):
        title = "Attention"
        content = table(*attention_rows(explanations))
        content += f'<p class="note">{html_text(POSITION_NOTE)}</p>' + table(*position_rows(explanations))
        content += image("attention to each part by layer", layers_figure(explanations))
        header, rows = head_rows(explanations)
        if rows:
            content += f'<p class="note">{html_text(HEADS_NOTE)}</p>' + table(header, rows)
        sections[title] = section(title, content, ATTENTION_NOTE)
    shown = explanations[:num_examples]
    if shown:
        title = f"Rows ({len(shown)} of {len(explanations)})"
        sections[title] = section(title, "".join(_row_article(explanation) for explanation in shown))
    top = f'<p class="note">{html_text(note)}</p>{contents(list(sections))}'
    return page(f"Passages of {name}", top + "".join(sections.values()))


def _definitions(rows: Rows) -> str:
    """Returns the meaning of each measure, which would make the table too wide."""
    items = "".join(f"<dt>{html_text(row[0])}</dt><dd>{html_text(row[-1])}</dd>" for row in rows)
    return f"<details><summary>What the measures mean</summary><dl>{items}</dl></details>"


def _row_article(explanation: Explanation) -> str:
    entries = {
        "question": html_text(explanation.question),
        "right answer": collapse(explanation.target, explanation.prediction),
        "generated answer": collapse(explanation.prediction, explanation.target) or "(empty)",
    }
    for name, effects in explanation.answers.items():
        change = f"{effects.log_p_none:.2f} without passages, {effects.log_p_all:.2f} with all of them"
        heading = f"effects on the {name} answer: log p of its {effects.num_tokens} tokens is {change}"
        entries[heading] = table(*_effect_rows(explanation, name, effects)) + _interactions(effects)
    answers = f"{explanation.target} {explanation.prediction}"
    for number, text in enumerate(explanation.texts, start=1):
        relevance = ", relevant" if explanation.is_relevant[number - 1] else ""
        entries[f"passage {number}: {explanation.documents[number - 1]}{relevance}"] = collapse(text, answers)
    return article(f"row {explanation.row}", entries)


def _interactions(effects: AnswerEffects) -> str:
    """Returns a line with the pairs of passages whose joint effect differs most from their single effects."""
    interactions = effects.interactions or []
    pairs = []
    for one, other in combinations(range(len(interactions)), 2):
        pairs.append((interactions[one][other], f"{one + 1} and {other + 1}"))
    pairs.sort(key=lambda pair: abs(pair[0]), reverse=True)
    if not pairs:
        return ""
    shown = "; ".join(f"{names}: {value:+.2f}" for value, names in pairs[:NUM_PAIRS])
    return f'<p class="note">Interactions of passages {shown}</p>'


def _effect_rows(explanation: Explanation, name: str, effects: AnswerEffects) -> tuple[list[str], Rows]:
    """Returns header and rows of the table of passages of an answer."""
    header = ["passage", "leave-one-out", "gradient x input"]
    passages = []
    for number, is_relevant in enumerate(explanation.is_relevant, start=1):
        passages.append(f"{number}, relevant" if is_relevant else str(number))
    columns = [passages, _with_bars(effects.leave_one_out), _with_bars(effects.gradient)]
    for title, values in (("linear model", effects.linear), ("Shapley value", effects.shapley)):
        if values is not None:
            header.insert(1, title)
            columns.insert(1, _with_bars(values))
    if name == GENERATED and RUN in explanation.attention:
        header.append("attention")
        columns.append(_with_bars(passage_masses(explanation.attention[RUN], len(explanation.documents)), signs=False))
    return header, [list(cells) for cells in zip(*columns, strict=True)]


def _with_bars(values: Sequence[float], signs: bool = True) -> list[str]:
    """Returns values with bars relative to the largest one. Bars of negative values are hollow.

    >>> _with_bars([2.0, -1.0])
    ['+2.00 ██████', '-1.00 ░░░']
    """
    largest = max(map(abs, values), default=0.0) or 1.0
    texts = []
    for value in values:
        length = round(BAR_LENGTH * abs(value) / largest)
        number = f"{value:+.2f}" if signs else f"{value:.3f}"
        texts.append(f"{number} {('█' if value > 0 else '░') * length}".rstrip())
    return texts


def effects_figure(explanations: Sequence[Explanation]) -> Figure:
    """Plots the effect of each passage on the right and on the generated answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    complete = [explanation for explanation in explanations if len(explanation.answers) == 2]
    for part, marker in ((OTHERS, "x"), (RELEVANT, "o")):
        on_right, on_generated = [], []
        for explanation in complete:
            for index, is_relevant in enumerate(explanation.is_relevant):
                if is_relevant == (part == RELEVANT):
                    on_right.append(explanation.answers[RIGHT].effects[index])
                    on_generated.append(explanation.answers[GENERATED].effects[index])
        axes.scatter(on_right, on_generated, label=part, marker=marker, color=COLORS[part], s=24)
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel("effect on log p(right answer)")
    axes.set_ylabel("effect on log p(generated answer)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def layers_figure(explanations: Sequence[Explanation]) -> Figure:
    """Plots the attention to each part in each layer, with the prompt and without it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    styles = {RUN: "-", BARE: "--"}
    for condition in conditions_of(explanations):
        if condition not in styles:
            continue
        by_layer = masses_by_layer(explanations, condition)
        for part, color in COLORS.items():
            if any(by_layer.get(part, ())):
                label = part if condition == RUN else f"{part}, {CONDITION_NAMES[condition]}"
                axes.plot(by_layer[part], linestyle=styles[condition], color=color, label=label, linewidth=1.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("attention mass")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure
