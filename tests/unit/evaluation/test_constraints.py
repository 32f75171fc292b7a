"""Pass rates of generated answers, compared with counts by hand."""

import pytest
from scripted_answers import ScriptedModel, evaluate, evaluate_in_processes, make_batches

import lightning_softprompt as sp
from lightning_softprompt.constraints.base import read_constraints
from lightning_softprompt.constraints.example import ConstrainedExample
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Example
from lightning_softprompt.evaluation.generation import GenerationEvaluation
from lightning_softprompt.evaluation.metrics.intervals import share_interval

FAMILIES = ("llama",)  # scripted answers do not depend on the family
TEMPLATE = Template("{soft}{text} it was {target}", ["text"])
COMMAS, SHORT = {"kind": "no_commas"}, {"kind": "word_count", "low": 1, "high": 2}
ROWS = [  # answer, constraints; the loose check may leave out no line here, since answers have one
    ("good , film", [COMMAS]),
    ("good film", [COMMAS, SHORT]),
    ("a good film", [COMMAS, SHORT]),
    ("good", [COMMAS]),
]


@pytest.fixture
def evaluation():
    return GenerationEvaluation(metrics=["rougeL"], constraints=True)


@pytest.fixture
def scripted(backbone):
    answers = [answer for answer, _ in ROWS]
    constraints = [read_constraints(values) for _, values in ROWS]
    examples = [ConstrainedExample({"text": "dog"}, "good", constraints=values) for values in constraints]
    return ScriptedModel(backbone, answers), make_batches(backbone.codec, TEMPLATE, examples, size=2)


def test_rates_by_constraint_and_by_prompt(evaluation, scripted):
    metrics, records = evaluate(evaluation, *scripted)
    assert metrics["constraints_strict"] == pytest.approx(4 / 6)
    assert metrics["prompts_strict"] == pytest.approx(2 / 4)
    assert metrics["no_commas_strict"] == metrics["no_commas_loose"] == pytest.approx(3 / 4)
    assert metrics["word_count_strict"] == pytest.approx(1 / 2)
    low, high = share_interval(3 / 4, 4)
    assert (metrics["no_commas_strict_low"], metrics["no_commas_strict_high"]) == pytest.approx((low, high))
    assert metrics["constraints_strict_low"] < 4 / 6 < metrics["constraints_strict_high"]
    assert [record["scores"]["constraints_strict"] for record in records] == [0, 1, 0.5, 1]
    validation, _ = evaluate(evaluation, *scripted, stage="val")
    assert set(validation) <= set(evaluation.logged)
    assert "prompts_loose" in validation
    assert "prompts_loose_low" not in validation


def test_rates_are_those_of_all_processes(evaluation, scripted, tmp_path):
    model, batches = scripted
    expected, _ = evaluate(evaluation, model, batches)
    for metrics, *_ in evaluate_in_processes(evaluation, model, [batches[:1], batches[1:]], tmp_path):
        assert metrics == expected


def test_rows_without_constraints_are_refused(evaluation, scripted, backbone):
    batches = make_batches(backbone.codec, TEMPLATE, [Example({"text": "dog"}, "good")])
    with pytest.raises(ValueError, match=r"set data\.constraints"):
        evaluate(evaluation, scripted[0], batches)


def test_the_data_module_reads_constraints(tiny_folder):
    def make_data(**options):
        row = {"document": "dog", "summary": "good", "rules": [COMMAS, SHORT]}
        return sp.SummarizationDataModule(
            backbone=sp.BackboneSpec(name=str(tiny_folder("llama"))), test=[row], template="{soft}{document}{target}",
            max_tokens=24, max_target_tokens=8, cache=False, **options,
        )  # fmt: skip

    data = make_data(constraints="rules")
    data.prepare_data()
    data.setup("test")
    (example,) = data.split("test").examples
    assert [constraint.label for constraint in example.constraints] == ["no_commas", "word_count"]
    assert "prompts_strict" in data.evaluation.logged
    assert "prompts_strict" not in make_data().evaluation.logged
    missing = make_data(constraints="rule")
    with pytest.raises(ValueError, match="no column 'rule'"):
        missing.setup("test")
