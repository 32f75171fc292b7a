"""Losses, class scores and metrics of several tasks in one batch are those of each task alone."""

from dataclasses import replace

import pytest
import torch
from tiny import CLASSES, batch_of
from torch.testing import assert_close

from lightning_softprompt.core.types import Classes
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
def made(backbone):
    def made(by_task=BOTH, **arguments):
        module = PromptTuning(length=3, classes_by_task=by_task, backbone=backbone.spec, **arguments)
        module.attach(backbone)
        return module.eval()

    return made


def mixed(codec, tasks=(1, 0, 1, 0), labels=(1, 2, 0, 1)):
    return replace(
        batch_of(codec, labels=labels),
        task_ids=torch.tensor(tasks),
        row_ids=(0, 1, 2, 3),
        global_row_ids=(9, 10, 11, 12),
    )


def alone(module, name):
    """The method on one task alone."""
    one = PromptTuning(length=3, classes=BOTH[name], backbone=module.spec)
    one.attach(module.loaded)
    one.tokens = module.tokens
    return one.eval()


def test_rows_of_a_batch_by_task(backbone):
    batch = mixed(backbone.codec)
    found = [(task, places, [*part.row_ids]) for task, places, part in batch.by_task()]
    assert found == [(0, [1, 3], [1, 3]), (1, [0, 2], [0, 2])]
    same = replace(batch, task_ids=torch.ones(4, dtype=torch.long))
    ((task, places, part),) = same.by_task()
    assert (task, places, part is same) == (1, [0, 1, 2, 3], True)
    assert [task for task, *_ in batch_of(backbone.codec).by_task()] == [0]


@pytest.mark.parametrize("readout", ["words", "ranked", "head"])
def test_the_loss_of_a_mixed_batch_is_the_mean_over_its_rows_of_each_tasks_own(made, backbone, readout):
    make = {"words": {}, "ranked": {"readout": RankedChoices}, "head": {"readout": ClassHead}}[readout]
    module = made(**make)
    batch = mixed(backbone.codec)
    total = 0.0
    for number, name in enumerate(BOTH):
        own = PromptTuning(length=3, classes=BOTH[name], backbone=backbone.spec, **make)
        own.attach(backbone)
        own.tokens = module.tokens
        own.readout = module.readout.of_tasks[name]
        for b in [b for b in range(4) if batch.task_ids[b] == number]:
            total += Classification()(own.eval().lm(), batch.only([b])).loss
    assert isinstance(module.objective, ByTask)
    assert_close(module.objective(module.lm(), batch).loss, total / 4)


def test_rows_without_labels_are_text(made, backbone):
    module = made({"mood": CLASSES, "summary": None})
    batch = mixed(backbone.codec)
    parts = [batch.only([1, 3]), replace(batch.only([0, 2]), labels=None)]
    losses = [ByTask()(module.lm(), part).loss for part in parts]
    assert_close(losses[0], Classification()(alone(module, "mood").lm(), parts[0]).loss)
    assert_close(losses[1], LanguageModeling()(module.lm(), parts[1]).loss)


def test_scores_are_of_one_task_and_of_one_that_has_classes(made, backbone):
    module = made({"mood": CLASSES, "summary": None})
    batch = mixed(backbone.codec)
    with pytest.raises(ValueError, match=r"the rows are of \['mood', 'summary'\]"):
        module.lm().scores(batch)
    with pytest.raises(ValueError, match="task 'summary' has no classes"):
        module.lm().scores(batch.only([0, 2]))
    assert module.lm().scores(batch.only([1, 3])).shape == (2, 3)


def test_a_readout_suits_classes_that_are_spoken_and_tags_that_are_not(made):
    tags = Classes({"O": (), "B-MOOD": ()})
    of_tasks = made({"mood": CLASSES, "tags": tags}, readout=AutoReadout).readout.of_tasks
    assert [type(of_tasks[name].inner) for name in ("mood", "tags")] == [LabelWords, TokenHead]
    assert of_tasks["tags"].inner.linear.weight.shape == (2, 32)
    with pytest.raises(ValueError, match="task 'tags': LabelWords requires label words"):
        made({"mood": CLASSES, "tags": tags})


def test_a_word_that_a_readout_cannot_say_is_told_with_its_task(made):
    with pytest.raises(ValueError, match="task 'length': label word ' good bad' is 2 tokens"):
        made({"mood": CLASSES, "length": Classes({"a": [" good bad"], "b": [" long"]})})


@torch.no_grad()
def test_metrics_are_those_of_each_task_alone_and_records_keep_their_place(made, backbone):
    evaluation = EvaluationByTask({name: ClassificationEvaluation(BOTH[name].names) for name in BOTH})
    module = made(evaluation=evaluation)
    batch = mixed(backbone.codec)
    module.reset_metrics("val", 0)
    records = module.score("val", batch)
    assert [record["row"] for record in records] == [9, 10, 11, 12]
    found = module.compute_metrics("val")
    accuracies = []
    for number, name in enumerate(BOTH):
        own, own_rows = ClassificationEvaluation(BOTH[name].names), (batch.task_ids == number).nonzero()[:, 0].tolist()
        said = own.update(alone(module, name).lm(), batch.only(own_rows))
        assert [records[b]["target"] for b in own_rows] == [record["target"] for record in said]
        for metric, value in own.compute().items():
            assert_close(found[f"val/{name}/{metric}"], value)
        accuracies.append(float(own.compute()["accuracy"]))
    assert float(found["val/macro"]) == pytest.approx(sum(accuracies) / 2)
    predicted = evaluation.predict(module.lm(), batch)
    assert [record["prediction"] for record in predicted] == [record["prediction"] for record in records]


def test_macro_is_no_number_where_a_task_was_not_scored():
    class Silent(ClassificationEvaluation.__mro__[1]):
        monitor = ("rouge1", "max")

        def predict(self, lm, batch):
            return []

        def update(self, lm, batch):
            return []

        def compute(self):
            return {"generated": torch.tensor(0.0)}

        def reset(self):
            pass

    assert EvaluationByTask({"summary": Silent()}).compute()["macro"].isnan()


def test_a_score_that_a_task_does_not_have_is_an_error(made, backbone):
    evaluation = EvaluationByTask({"mood": ClassificationEvaluation(CLASSES.names)}, {"mood": "rouge1"})
    module = made({"mood": CLASSES}, evaluation=evaluation)
    module.score("val", mixed(backbone.codec, tasks=(0,) * 4, labels=(1, 2, 0, 1)))
    with pytest.raises(ValueError, match=r"'rouge1' for task 'mood', which has \['accuracy'"):
        module.compute_metrics("val")
