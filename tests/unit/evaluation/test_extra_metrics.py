"""Metrics of torchmetrics that the user adds to the evaluation of a classification."""

from types import SimpleNamespace

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassRecall,
)

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.runs.run_spec import RunSpec
from lightning_softprompt.training.python_config import python_config

NAMES = ("bad", "one", "good")
METRICS = {
    "multiclass_calibration_error": MulticlassCalibrationError(3),
    "multiclass_auroc": MulticlassAUROC(3),
}


class Margin(Metric):
    """The mean and the sum of the greatest probability."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, probabilities, labels):
        self.total += probabilities.max(-1).values.sum()
        self.rows += len(labels)

    def compute(self):
        return {"margin_mean": self.total / self.rows, "margin_sum": self.total}


class Accuracy(Margin):
    """A metric with the name of a standard one."""

    def compute(self):
        return self.total


def make_batch(seed, rows=8):
    """Returns a batch whose inputs are the class scores."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    return SimpleNamespace(labels=labels, scores=torch.randn(rows, 3, generator=generator))


LM = SimpleNamespace(scores=lambda batch: batch.scores)


def evaluate(evaluation, *batches):
    evaluation.begin("val", 0)
    for batch in batches:
        evaluation.update(LM, batch)
    return evaluation.compute()


def test_extra_metrics_equal_torchmetrics_on_all_rows_at_once_also_after_a_reset():
    evaluation = ClassificationEvaluation(NAMES, list(METRICS.values()))
    for seeds in ((0, 1), (2, 3)):
        batches = [make_batch(seed) for seed in seeds]
        results = evaluate(evaluation, *batches)
        probabilities = torch.cat([batch.scores for batch in batches]).softmax(-1)
        labels = torch.cat([batch.labels for batch in batches])
        for name, metric in METRICS.items():
            assert float(results[name]) == pytest.approx(float(metric.clone()(probabilities, labels)), abs=1e-6)
    assert set(results) == set(evaluation.logged)
    assert all(metric.update_count == 0 for metric in METRICS.values())  # the evaluation has clones


def test_a_mapping_names_its_results():
    evaluation = ClassificationEvaluation(NAMES, [Margin()])
    batch = make_batch(0)
    results = evaluate(evaluation, batch)
    expected = batch.scores.softmax(-1).max(-1).values
    assert float(results["margin_mean"]) == pytest.approx(float(expected.mean()))
    assert float(results["margin_sum"]) == pytest.approx(float(expected.sum()))
    assert evaluation.logged[-2:] == ("margin_mean", "margin_sum")


def test_the_metric_determines_whether_lower_is_better():
    evaluation = ClassificationEvaluation(NAMES, list(METRICS.values()))
    assert evaluation.mode_of("multiclass_calibration_error") == "min"
    assert evaluation.mode_of("multiclass_auroc") == "max"
    assert evaluation.mode_of("cross_entropy") == "min"


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_an_evaluation_without_rows_has_no_extra_metrics():
    results = evaluate(ClassificationEvaluation(NAMES, [MulticlassCalibrationError(3)]))
    assert "accuracy" in results
    assert "multiclass_calibration_error" not in results


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([MulticlassConfusionMatrix(3)], r"multiclass_confusion_matrix must be a scalar, got \[3, 3\]"),
        ([MulticlassRecall(3, average="none")], r"multiclass_recall must be a scalar, got \[3\].*average"),
        ([MulticlassCalibrationError(5)], "MulticlassCalibrationError cannot be used for this task"),
        ([Accuracy()], "another metric 'accuracy'"),
        ([Margin(), Margin()], "another metric 'margin_mean'"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_training(metrics, message):
    with pytest.raises(ValueError, match=f"extra_metrics: .*{message}"):
        ClassificationEvaluation(NAMES, metrics)


def test_the_config_of_a_training_in_python_names_the_option_that_it_leaves_out(tiny_folder):
    spec = BackboneSpec(name=str(tiny_folder("llama")))
    labels = {"bad": ["bad"], "one": ["one"], "good": ["good"]}
    data = ClassificationDataModule(labels=labels, backbone=spec, extra_metrics=[MulticlassAUROC(3)])
    assert "multiclass_auroc" in data.evaluation.logged
    config = python_config(PromptTuning(length=2, backbone=spec), data, RunSpec(), {})
    assert config.left_out == {"data.extra_metrics": "an object of MulticlassAUROC was passed in Python"}
    assert "extra_metrics" not in config.values["data"]["init_args"]
