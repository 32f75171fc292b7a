"""Measures over explained rows, their comparison between runs, and the page."""

from dataclasses import replace

import pytest

from lightning_softprompt.analysis.attention_summary import (
    OTHERS,
    RELEVANT,
    heads_by_relevance,
    lift,
    masses_by_layer,
    masses_by_position,
    mean_tokens,
)
from lightning_softprompt.analysis.explanation import GENERATED, RIGHT, USE, Explanation, compare, summarize
from lightning_softprompt.analysis.explanation_page import comparison_rows, explanation_page, measure_rows
from lightning_softprompt.analysis.passage_effects import BARE, REVERSED, RUN, SOFT_TOKENS, AnswerEffects
from lightning_softprompt.backbones.tokenization.token_names import START

HOSTILE = "<script>alert(1)</script> & \x1b[2J"


def make_effects(shapley, leave_one_out=None, num_tokens=2):
    left_out = leave_one_out or shapley
    return AnswerEffects("text", num_tokens, -9.0, -9.0 + sum(shapley), left_out, shapley, [-v for v in left_out])


def make_explanation(row, generated, right, is_relevant, **changes):
    masses = {SOFT_TOKENS: [0.1, 0.3], "passage 1": [0.2, 0.2], "passage 2": [0.3, 0.1], START: [0.4, 0.4]}
    attention = {RUN: masses, REVERSED: masses, BARE: {**masses, SOFT_TOKENS: [0.0, 0.0], START: [0.5, 0.7]}}
    explanation = Explanation(
        row=row,
        question=f"question {row}",
        prediction="a text",
        target="right text",
        documents=["d1", "d2"],
        texts=["one", HOSTILE],
        is_relevant=is_relevant,
        answers={GENERATED: generated, RIGHT: right},
        attention=attention,
        num_tokens={SOFT_TOKENS: 2, "passage 1": 3, "passage 2": 5, START: 1},
    )
    return replace(explanation, **changes)


@pytest.fixture
def explanations():
    first = make_explanation(3, make_effects([1.0, 3.0], [0.5, 2.0]), make_effects([2.0, 1.0]), [True, False])
    second = make_explanation(5, make_effects([4.0, 1.0], [3.0, -1.0]), make_effects([2.0, 3.0]), [True, False])
    unknown = make_explanation(7, make_effects([1.0, 1.0]), make_effects([1.0, 1.0]), [False, False])
    return [first, second, unknown]


def test_measures_are_means_over_the_rows_that_define_them(explanations):
    summary = summarize(explanations)
    generated = summary[GENERATED]
    assert generated[USE]["mean"] == 0.5
    assert generated[USE]["rows"] == 2
    assert generated["chance"]["mean"] == 0.5
    assert generated["leak"]["mean"] == pytest.approx((2 - 1 + 1) / 3)
    assert generated["leak"]["rows"] == 3
    assert generated["leak_per_token"]["mean"] == pytest.approx((2 - 1 + 1) / 3 / 2)
    assert generated["relevant_effect"]["mean"] == 2.5
    assert generated["other_effect"]["mean"] == pytest.approx((3 + 1 + 1) / 3)
    assert generated["gain"]["mean"] == pytest.approx((4 + 5 + 2) / 3)
    assert generated["gradient_agreement"]["mean"] == -1
    assert generated["gradient_agreement"]["rows"] == 2  # equal effects have no order
    assert "attention_agreement" not in generated  # both passages have the same attention
    assert summary[RIGHT][USE]["mean"] == 0.5
    for measures in generated.values():
        assert measures["low"] <= measures["mean"] <= measures["high"]


def test_attention_is_compared_with_leave_one_out(explanations):
    masses = {"passage 1": [0.2, 0.2], "passage 2": [0.3, 0.2]}
    explanation = replace(explanations[0], attention={RUN: masses})
    assert explanation.measure(GENERATED)["attention_agreement"] == 1
    assert "attention_agreement" not in explanation.measure(RIGHT)
    opposite = replace(explanations[1], attention={RUN: masses})
    assert opposite.measure(GENERATED)["attention_agreement"] == -1


def test_many_passages_are_ranked_by_the_linear_model(explanations):
    effects = replace(make_effects([1.0, 3.0], [5.0, 2.0]), shapley=None, linear=[4.0, 1.0])
    explanation = replace(explanations[0], answers={GENERATED: effects})
    assert explanation.measure(GENERATED)[USE] == 1
    assert explanation.measure(GENERATED)["relevant_effect"] == 4
    assert explanation.measure(RIGHT) == {}


def test_interactions_count_between_relevant_passages(explanations):
    effects = replace(explanations[0].answers[RIGHT], interactions=[[0.0, -2.5], [-2.5, 0.0]])
    one_relevant = replace(explanations[0], answers={RIGHT: effects})
    assert "relevant_interaction" not in one_relevant.measure(RIGHT)
    both_relevant = replace(one_relevant, is_relevant=[True, True])
    assert both_relevant.measure(RIGHT)["relevant_interaction"] == -2.5
    page = explanation_page("run", [both_relevant], summarize([both_relevant]), None, 1, "")
    assert "Interactions of passages 1 and 2: -2.50" in page


def test_heads_are_ranked_by_attention_to_relevant_passages(explanations):
    def attend(relevant, other):
        """Attention of two layers with two heads."""
        return {"passage 1": relevant, "passage 2": other}

    forward = attend([[0.1, 0.2], [0.6, 0.0]], [[0.3, 0.2], [0.1, 0.0]])
    backward = attend([[0.2, 0.2], [0.4, 0.0]], [[0.1, 0.2], [0.1, 0.0]])
    first = replace(explanations[0], head_attention={RUN: forward, REVERSED: backward})
    second = replace(explanations[1], head_attention={RUN: forward, REVERSED: backward}, is_relevant=[False, True])
    not_counted = replace(explanations[2], head_attention={RUN: forward, REVERSED: backward})
    heads = heads_by_relevance([first, second, not_counted])
    assert [(head.layer, head.head) for head in heads] == [(1, 0), (0, 0), (0, 1), (1, 1)]
    assert heads[0].relevant == pytest.approx((0.6 + 0.1) / 2)
    assert heads[0].others == pytest.approx((0.1 + 0.6) / 2)
    assert heads[0].relevant_reversed == pytest.approx((0.4 + 0.1) / 2)
    assert heads_by_relevance([not_counted, explanations[0]]) == []
    page = explanation_page("run", [first], summarize([first]), None, 1, "")
    assert "relevant passages, reversed" in page


def test_runs_are_compared_by_row(explanations):
    others = [replace(each, answers={RIGHT: make_effects([0.5, 0.5])}) for each in reversed(explanations)]
    comparison = compare(explanations, others)
    assert comparison[GENERATED] == {}
    gain = comparison[RIGHT]["gain"]
    assert gain["difference"] == pytest.approx((3 + 5 + 2) / 3 - 1)
    assert gain["low"] <= gain["difference"] <= gain["high"]
    assert gain["rows"] == 3
    zero = compare(explanations, explanations)[GENERATED]["leak"]
    assert (zero["difference"], zero["low"], zero["high"]) == (0, 0, 0)


def test_other_rows_are_not_compared(explanations):
    with pytest.raises(ValueError, match="row 7 is not in the other run"):
        compare(explanations, explanations[:2])
    changed = [replace(explanations[0], target="another")]
    with pytest.raises(ValueError, match="row 3 has the question 'question 3' in one run"):
        compare(explanations[:1], changed)


def test_records_have_all_values(explanations):
    assert [Explanation.from_record(each.to_record()) for each in explanations] == explanations


def test_attention_is_summed_over_relevant_and_other_passages(explanations):
    rows = explanations[:1]
    masses = masses_by_layer(rows, RUN)
    assert masses[RELEVANT] == [0.2, 0.2]
    assert masses[OTHERS] == [0.3, 0.1]
    assert sum(by_layer[0] for by_layer in masses.values()) == pytest.approx(1)
    both = masses_by_layer(explanations, RUN)
    assert both[OTHERS] == pytest.approx([(0.3 + 0.3 + 0.5) / 3, (0.1 + 0.1 + 0.3) / 3])
    num_tokens = mean_tokens(rows)
    assert num_tokens[OTHERS] == 5
    assert lift({RELEVANT: 0.2, START: 0.4}, num_tokens) == {RELEVANT: pytest.approx(0.2 / (3 / 10))}


def test_positions_of_reversed_passages_are_reversed(explanations):
    assert masses_by_position(explanations, RUN, False) == pytest.approx([0.2, 0.2])
    one = [replace(explanations[0], attention={REVERSED: {"passage 1": [0.1], "passage 2": [0.4]}})]
    assert masses_by_position(one, REVERSED, True) == [0.4, 0.1]


def test_the_page_has_all_parts_and_no_code_from_data(explanations):
    comparison = compare(explanations, explanations)
    summary = summarize(explanations)
    page = explanation_page(HOSTILE, explanations, summary, comparison, 2, HOSTILE)
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("<article>") == 2
    assert page.count("<img") == 2
    for text in ("Compared with the other run", "without prompt", "1, relevant", "+3.00 ██████", "Rows (2 of 3)"):
        assert text in page
    header, rows = measure_rows(summary)
    assert [row[0] for row in rows][:3] == ["use", "chance", "leak"]
    assert all(len(row) == len(header) for row in rows)
    header, rows = comparison_rows(comparison)
    assert all(len(row) == len(header) for row in rows)


def test_a_page_without_attention_and_relevance_has_fewer_parts(explanations):
    rows = [replace(explanations[2], attention={}, num_tokens={})]
    page = explanation_page("run", rows, summarize(rows), None, 5, "")
    assert '<h2 id="attention"' not in page
    assert "<img" not in page
    assert "relevant_effect" not in page
