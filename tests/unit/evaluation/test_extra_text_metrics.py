"""Text metrics of torchmetrics that the user adds to an evaluation of generated text."""

from types import SimpleNamespace

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC, MulticlassCalibrationError
from torchmetrics.text import (
    BLEUScore,
    CharErrorRate,
    CHRFScore,
    EditDistance,
    ExtendedEditDistance,
    MatchErrorRate,
    ROUGEScore,
    SacreBLEUScore,
    TranslationEditRate,
    WordErrorRate,
    WordInfoLost,
)

from lightning_softprompt.checkpoints.safe_loading.registry import find_class
from lightning_softprompt.core.types import IGNORE, Batch, Example
from lightning_softprompt.evaluation.generation import GenerationEvaluation
from lightning_softprompt.evaluation.metrics.extra_text import ExtraTextMetrics, takes_several_references
from lightning_softprompt.evaluation.multiple_choice import ChoiceEvaluation
from lightning_softprompt.evaluation.qa import QaEvaluation
from lightning_softprompt.evaluation.tagging import TaggingEvaluation

SEVERAL = (BLEUScore, CHRFScore, ExtendedEditDistance, ROUGEScore, SacreBLEUScore, TranslationEditRate)
ONE = (CharErrorRate, EditDistance, MatchErrorRate, WordErrorRate, WordInfoLost)
ANSWERS = ["a dog barks", "it rains", "the sun"]
REFERENCES = [("a dog barked", "the dog barks"), ("it rains today",), ("the moon", "the sun shines")]
EXAMPLES = [Example({"document": "text"}, texts[0], references=texts) for texts in REFERENCES]


class Characters(Metric):
    """The mean number of characters of answers, and the number of references. Its `update` has no types."""

    def __init__(self):
        super().__init__()
        self.add_state("lengths", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("references", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, answers, references):
        self.lengths += sum(map(len, answers))
        self.rows += len(answers)
        self.references += sum(map(len, references))

    def compute(self):
        return {"characters": self.lengths / self.rows, "references": self.references}


def evaluate(evaluation, answers, examples, monkeypatch):
    """Scores given answers in batches of two."""
    monkeypatch.setattr(type(evaluation.decoding), "texts", lambda self, codec, ids: ids)
    monkeypatch.setattr(type(evaluation.decoding), "are_finished", lambda self, codec, ids: [True] * len(ids))
    word_embeddings = torch.zeros(1)
    backbone = SimpleNamespace(codec=None, word_embeddings=word_embeddings)
    evaluation.begin("val", 0)
    for start in range(0, len(answers), 2):
        ids = torch.zeros(len(answers[start : start + 2]), 1, dtype=torch.long)
        rows = tuple(range(start, start + len(ids)))
        batch = Batch(ids, ids == 0, ids == 0, ids, ids, examples=tuple(examples[start : start + 2]), row_ids=rows)
        texts = answers[start : start + 2]
        evaluation.update(SimpleNamespace(generate=lambda batch, texts=texts, **_: texts, backbone=backbone), batch)
    return evaluation.compute()


def test_the_types_of_update_determine_the_references():
    assert all(takes_several_references(metric()) for metric in SEVERAL)
    assert not any(takes_several_references(metric()) for metric in ONE)
    assert takes_several_references(Characters())


@pytest.mark.parametrize("build", [GenerationEvaluation, QaEvaluation])
def test_results_are_those_of_torchmetrics_on_all_rows(build, monkeypatch):
    metrics = [BLEUScore(n_gram=2), CHRFScore(), TranslationEditRate(), WordErrorRate(), Characters()]
    if build is GenerationEvaluation:
        evaluation = build(metrics=["rouge1"], extra_metrics=metrics)
    else:
        evaluation = build(extra_metrics=metrics)
    results = evaluate(evaluation, ANSWERS, EXAMPLES, monkeypatch)
    several = [list(texts) for texts in REFERENCES]
    for name, metric in zip(("bleu_score", "chrf_score", "translation_edit_rate"), metrics, strict=False):
        assert float(results[name]) == pytest.approx(float(metric.clone()(ANSWERS, several)))
    expected = float(WordErrorRate()(ANSWERS, [texts[0] for texts in REFERENCES]))
    assert float(results["word_error_rate"]) == pytest.approx(expected)
    assert (float(results["characters"]), float(results["references"])) == (pytest.approx(26 / 3), 5)
    assert set(evaluation.logged) >= {"bleu_score", "word_error_rate", "characters"}
    assert (evaluation.mode_of("word_error_rate"), evaluation.mode_of("chrf_score")) == ("min", "max")
    assert evaluate(evaluation, ANSWERS, EXAMPLES, monkeypatch) == results


def test_rows_without_a_correct_answer_are_left_out(monkeypatch):
    evaluation = QaEvaluation(abstain="unknown", extra_metrics=[WordErrorRate(), Characters()])
    unanswerable = Example({"document": "text"}, "unknown", references=("unknown",))
    results = evaluate(evaluation, [*ANSWERS, "a guess"], [*EXAMPLES, unanswerable], monkeypatch)
    assert float(results["characters"]) == pytest.approx(26 / 3)
    only = evaluate(evaluation, ["a guess"], [unanswerable], monkeypatch)
    assert "characters" not in only


def test_a_metric_of_one_reference_says_which_one(caplog):
    metrics = ExtraTextMetrics([WordErrorRate()], ())
    metrics.compute(["a"], [["a"]])
    assert not caplog.text
    metrics.compute(["a"], [["a", "b"]])
    assert "WordErrorRate compares a text with one reference: the first of each row" in caplog.text


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MulticlassAUROC(2), "MulticlassAUROC cannot be used for this task"),
        (ROUGEScore(rouge_keys="rouge1"), "another metric 'rouge1_fmeasure'"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_training(metric, message):
    with pytest.raises(ValueError, match=f"extra_metrics: .*{message}"):
        ExtraTextMetrics([metric], {"rouge1_fmeasure"})


def test_tags_and_choices_have_extra_metrics_of_classes():
    tagging = TaggingEvaluation(["O", "B-X"], [MulticlassCalibrationError(2)])
    scores = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    labels = torch.tensor([[0, 0, IGNORE]])
    words = torch.tensor([[0, 1, IGNORE]])
    batch = SimpleNamespace(labels=labels, words=words)
    tagging.begin("val", 0)
    tagging.update(SimpleNamespace(scores=lambda _: scores), batch)
    expected = MulticlassCalibrationError(2)(scores[0, :2].softmax(-1), labels[0, :2])
    assert float(tagging.compute()["multiclass_calibration_error"]) == pytest.approx(float(expected))
    assert tagging.mode_of("multiclass_calibration_error") == "min"
    tagging.begin("val", 0)
    assert "multiclass_calibration_error" not in tagging.compute()
    choices = ChoiceEvaluation(("a", "b"), [MulticlassCalibrationError(2)])
    assert "multiclass_calibration_error" in choices.logged
    assert choices.mode_of("multiclass_calibration_error") == "min"


def test_files_name_only_text_metrics_that_load_nothing():
    find_class("torchmetrics.text.CHRFScore")
    for name in ("BERTScore", "InfoLM", "SacreBLEUScore", "ROUGEScore"):
        with pytest.raises(ValueError, match=name):
            find_class(f"torchmetrics.text.{name}")
