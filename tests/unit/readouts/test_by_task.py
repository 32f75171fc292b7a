"""Losses, class scores and metrics of a batch of several tasks equal those of each task on its own."""

from dataclasses import replace

import pytest
import torch
from tiny import CLASSES, batch_of
from torch.testing import assert_close

from lightning_softprompt.core.types import Classes
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.by_task import EvaluationByTask
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.objectives.by_task import ByTask
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.readouts.auto import AutoReadout
from lightning_softprompt.readouts.class_head import ClassHead
from lightning_softprompt.readouts.label_words import LabelWords
from lightning_softprompt.readouts.ranked import RankedChoices
from lightning_softprompt.readouts.token_head import TokenHead

FAMILIES = ("llama", "bert")
OTHER = Classes({"long": [" long"], "short": [" never"]})
BOTH = {"mood": CLASSES, "length": OTHER}


@pytest.fixture
def make_module(backbone):
    """Returns a function that creates a module of several tasks."""

    def make_module(classes_by_task=BOTH, **arguments):
        module = PromptTuning(length=3, classes_by_task=classes_by_task, backbone=backbone.spec, **arguments)
        module.attach(backbone)
        return module.eval()

    return make_module


def make_batch(codec, tasks=(1, 0, 1, 0), labels=(1, 2, 0, 1)):
    """Returns a batch whose rows have the given tasks."""
    ids = {"row_ids": (0, 1, 2, 3), "global_row_ids": (9, 10, 11, 12)}
    return replace(batch_of(codec, labels=labels), task_ids=torch.tensor(tasks), **ids)


def single_task_module(module, task, **arguments):
    """Returns a module of one task with the prompt of a module of several tasks."""
    single = PromptTuning(length=3, classes=BOTH[task], backbone=module.spec, **arguments)
    single.attach(module.loaded)
    single.tokens = module.tokens
    return single.eval()


def test_a_batch_is_split_by_task(backbone):
    batch = make_batch(backbone.codec)
    (first, first_positions, first_part), (second, second_positions, second_part) = batch.by_task()
    assert (first, second) == (0, 1)
    assert first_positions == list(first_part.row_ids) == [1, 3]
    assert second_positions == list(second_part.row_ids) == [0, 2]


def test_a_batch_of_one_task_is_not_copied(backbone):
    batch = make_batch(backbone.codec, tasks=(1, 1, 1, 1))
    ((task, positions, part),) = batch.by_task()
    assert (task, positions) == (1, [0, 1, 2, 3])
    assert part is batch
    assert [task for task, *_ in batch_of(backbone.codec).by_task()] == [0]


@pytest.mark.parametrize("arguments", [{}, {"readout": RankedChoices}, {"readout": ClassHead}])
def test_the_loss_of_several_tasks_is_the_mean_of_the_losses_of_their_rows(make_module, backbone, arguments):
    module = make_module(**arguments)
    batch = make_batch(backbone.codec)
    total = 0.0
    for b, task in enumerate(batch.task_ids):
        name = list(BOTH)[task]
        single = single_task_module(module, name, **arguments)
        single.readout = module.readout.of_tasks[name]
        total += Classification()(single.lm(), batch.only([b])).loss
    assert isinstance(module.objective, ByTask)
    assert_close(module.objective(module.lm(), batch).loss, total / 4)


def test_rows_without_labels_have_the_loss_of_language_modeling(make_module, backbone):
    module = make_module({"mood": CLASSES, "summary": None})
    batch = make_batch(backbone.codec)
    mood, summary = batch.only([1, 3]), replace(batch.only([0, 2]), labels=None)
    mood_module = single_task_module(module, "mood")
    assert_close(ByTask()(module.lm(), mood).loss, Classification()(mood_module.lm(), mood).loss)
    assert_close(ByTask()(module.lm(), summary).loss, LanguageModeling()(module.lm(), summary).loss)


def test_class_scores_require_a_batch_of_one_task_with_classes(make_module, backbone):
    module = make_module({"mood": CLASSES, "summary": None})
    batch = make_batch(backbone.codec)
    with pytest.raises(ValueError, match=r"the rows are of \['mood', 'summary'\]"):
        module.lm().scores(batch)
    with pytest.raises(ValueError, match="task 'summary' has no classes"):
        module.lm().scores(batch.only([0, 2]))
    assert module.lm().scores(batch.only([1, 3])).shape == (2, 3)


def test_the_automatic_readout_of_a_task_depends_on_whether_its_classes_have_words(make_module):
    tags = Classes({"O": (), "B-MOOD": ()})
    of_tasks = make_module({"mood": CLASSES, "tags": tags}, readout=AutoReadout).readout.of_tasks
    assert [type(of_tasks[name].inner) for name in ("mood", "tags")] == [LabelWords, TokenHead]
    assert of_tasks["tags"].inner.linear.weight.shape == (2, 32)
    with pytest.raises(ValueError, match="task 'tags': LabelWords requires label words"):
        make_module({"mood": CLASSES, "tags": tags})


def test_a_label_word_of_several_tokens_is_rejected_with_its_task(make_module):
    with pytest.raises(ValueError, match="task 'length': label word ' good bad' is 2 tokens"):
        make_module({"mood": CLASSES, "length": Classes({"a": [" good bad"], "b": [" long"]})}, readout=LabelWords)


@torch.no_grad()
def test_metrics_equal_those_of_each_task_and_records_are_in_the_order_of_the_batch(make_module, backbone):
    evaluation = EvaluationByTask({name: ClassificationEvaluation(BOTH[name].names) for name in BOTH})
    module = make_module(evaluation=evaluation)
    batch = make_batch(backbone.codec)
    module.reset_metrics("val", 0)
    records = module.score("val", batch)
    assert [record["row"] for record in records] == [9, 10, 11, 12]
    metrics = module.compute_metrics("val")
    accuracies = []
    for task, positions in (("mood", [1, 3]), ("length", [0, 2])):
        single = ClassificationEvaluation(BOTH[task].names)
        single.begin("val", 0)
        expected_records = single.update(single_task_module(module, task).lm(), batch.only(positions))
        assert [records[b]["target"] for b in positions] == [record["target"] for record in expected_records]
        expected = single.compute()
        for metric, value in expected.items():
            assert_close(metrics[f"val/{task}/{metric}"], value)
        accuracies.append(float(expected["accuracy"]))
    assert float(metrics["val/macro"]) == pytest.approx(sum(accuracies) / 2)
    predictions = [record["prediction"] for record in evaluation.predict(module.lm(), batch)]
    assert predictions == [record["prediction"] for record in records]


def test_macro_is_nan_if_a_task_was_not_scored():
    class EvaluationWithoutScores(Evaluation):
        monitor = ("rouge1", "max")

        def predict(self, lm, batch):
            return []

        def update(self, lm, batch):
            return []

        def compute(self):
            return {"generated": torch.tensor(0.0)}

        def reset(self):
            pass

    assert EvaluationByTask({"summary": EvaluationWithoutScores()}).compute()["macro"].isnan()


def test_an_unknown_score_of_a_task_is_rejected(make_module, backbone):
    evaluation = EvaluationByTask({"mood": ClassificationEvaluation(CLASSES.names)}, {"mood": "rouge1"})
    module = make_module({"mood": CLASSES}, evaluation=evaluation)
    module.score("val", make_batch(backbone.codec, tasks=(0,) * 4, labels=(1, 2, 0, 1)))
    with pytest.raises(ValueError, match=r"'rouge1' for task 'mood', which has \['accuracy'"):
        module.compute_metrics("val")
