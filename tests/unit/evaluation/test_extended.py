"""Evaluations of the user in addition to the evaluation of a task."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassCalibrationError

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.multiple_choice import MultipleChoiceDataModule
from lightning_softprompt.data.tagging import TaggingDataModule
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.by_task import EvaluationByTask
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.evaluation.extended import ExtendedEvaluation, UserMetrics

NAMES = ("bad", "one", "good")
LM = SimpleNamespace(scores=lambda batch: batch.scores)


class Margin(Evaluation):
    """The mean difference of the two greatest scores, and the stages and rows that were announced."""

    monitor = ("margin_error", "min")
    logged = ("margin_error", "margin")

    def __init__(self):
        super().__init__()
        self.margin = MeanMetric()
        self.calls = []

    def predict(self, lm, batch):
        raise AssertionError("the records are those of the task")

    def update(self, lm, batch):
        best = lm.scores(batch).topk(2).values
        self.margin.update(best[:, 0] - best[:, 1])
        return [{"prediction": "unused"}] * len(batch.labels)

    def compute(self):
        margin = self.margin.compute()
        return {"margin": margin, "margin_error": -margin}

    def reset(self):
        self.margin.reset()

    def begin(self, stage, epoch):
        self.calls.append((stage, epoch))
        super().begin(stage, epoch)

    def limit_rows(self, rows):
        self.calls.append(rows)

    def figures(self):
        return {"confusion": plt.figure()}


class Unlisted(Margin):
    """An evaluation that does not list its metrics."""

    logged = None

    def compute(self):
        return {"accuracy": self.margin.compute()}


def make_batch(seed, rows=8):
    """Returns a batch whose inputs are the class scores."""
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(labels=torch.arange(rows) % 3, scores=torch.randn(rows, 3, generator=generator))


def evaluate(evaluation, *batches):
    evaluation.begin("val", 0)
    records = [evaluation.update(LM, batch) for batch in batches]
    return evaluation.compute(), records


def test_the_metrics_are_those_of_both_and_the_records_those_of_the_task():
    default, margin = ClassificationEvaluation(NAMES), Margin()
    evaluation = UserMetrics.from_option(margin).extend(ClassificationEvaluation(NAMES))
    for seeds in ((0, 1), (2,)):  # the second evaluation starts from zero
        batches = [make_batch(seed) for seed in seeds]
        results, records = evaluate(evaluation, *batches)
        expected, expected_records = evaluate(default, *batches)
        best = torch.cat([batch.scores for batch in batches]).topk(2).values
        assert records == expected_records
        assert evaluation.predict(LM, batches[0]) == default.predict(LM, batches[0])
        expected_margin = (best[:, 0] - best[:, 1]).mean()
        assert float(results.pop("margin")) == pytest.approx(float(expected_margin))
        assert float(results.pop("margin_error")) < 0
        assert results == expected
    assert margin.margin.update_count == 0  # the evaluation has a copy


def test_names_plots_and_the_monitor_are_those_of_the_task_first():
    evaluation = ExtendedEvaluation(ClassificationEvaluation(NAMES), [Margin()])
    assert (evaluation.monitor, evaluation.case_ranking) == (("accuracy", "max"), ClassificationEvaluation.case_ranking)
    assert evaluation.logged[-2:] == Margin.logged
    assert evaluation.by_class == ClassificationEvaluation(NAMES).by_class
    assert [evaluation.mode_of(name) for name in ("margin_error", "margin", "loss")] == ["min", "max", "min"]
    evaluate(evaluation, make_batch(0))
    assert set(evaluation.figures()) == {"confusion", "margin_confusion"}
    plt.close("all")


def test_stages_and_rows_reach_both():
    evaluation = ExtendedEvaluation(ClassificationEvaluation(NAMES), [Margin()])
    evaluation.begin("test", 3)
    evaluation.limit_rows([[0, 2]])
    default, added = evaluation.evaluations
    assert (default.stage, added.stage, evaluation.stage) == ("test", "test", "test")
    assert added.calls == [("test", 3), [[0, 2]]]


def test_two_metrics_of_one_name_are_refused():
    with pytest.raises(ValueError, match="Margin has the metric 'margin_error', but there is another"):
        ExtendedEvaluation(ClassificationEvaluation(NAMES), [Margin(), Margin()])
    evaluation = ExtendedEvaluation(ClassificationEvaluation(NAMES), [Unlisted()])
    assert evaluation.logged is None
    with pytest.raises(ValueError, match="Unlisted has the metric 'accuracy', but there is another"):
        evaluate(evaluation, make_batch(0))


def test_the_option_takes_one_or_several_metrics_and_evaluations(tiny_folder):
    spec = BackboneSpec(name=str(tiny_folder("llama")))
    labels = {"bad": ["bad"], "one": ["one"], "good": ["good"]}
    both = [Margin(), MulticlassCalibrationError(3)]
    data = ClassificationDataModule(labels=labels, backbone=spec, extra_metrics=both)
    assert {"multiclass_calibration_error", "margin"} < set(data.evaluation.logged)
    tags = TaggingDataModule(tags=["O", "B-PER", "I-PER"], backbone=spec, extra_metrics=MulticlassCalibrationError(3))
    assert "multiclass_calibration_error" in tags.evaluation.logged
    choices = MultipleChoiceDataModule(backbone=spec, extra_metrics=Margin())
    assert {"chance", "margin"} < set(choices.evaluation.logged)
    with pytest.raises(ValueError, match="MultipleChoiceDataModule requires evaluations"):
        MultipleChoiceDataModule(backbone=spec, extra_metrics=[MulticlassCalibrationError(3)])
    assert type(ClassificationDataModule(labels=labels, backbone=spec).evaluation) is ClassificationEvaluation


@pytest.mark.parametrize(("value", "hint"), [(Margin, r"pass an object, Margin\(\.\.\.\)"), ("margin.Margin", "'m'")])
def test_a_class_or_a_text_is_refused(value, hint):
    option = value if isinstance(value, str) else [value]
    with pytest.raises(ValueError, match=f"requires metrics of torchmetrics or evaluations, got .*{hint}"):
        UserMetrics.from_option(option)


def test_the_monitor_of_an_evaluation_determines_its_mode_also_for_one_task_of_several():
    evaluation = EvaluationByTask({"stars": Margin(), "topic": ClassificationEvaluation(NAMES)}, {"stars": "margin"})
    assert evaluation.mode_of("stars/margin_error") == "min"
    assert evaluation.mode_of("topic/accuracy") == "max"
