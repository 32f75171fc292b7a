"""Requirements of methods for several tasks on every family of backbones: one batch has rows of several tasks."""

import logging
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from tiny import CLASSES, MASKED, TEMPLATES, batch_of, encode_rows, more_padding, on_side, perturb, real
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.core.types import Classes
from lightning_softprompt.evaluation.by_task import EvaluationByTask
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import ATTEMPT, MPT, TransPrompt
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.prompts.init import FromText, SampleVocabulary

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BY_TASK = {"mood": CLASSES, "length": Classes({"long": [" long"], "short": [" never"], "other": [" one"]})}
TASKS = torch.tensor([1, 0, 0, 1])
SOURCES = [FromText("is this film good ?"), SampleVocabulary()]
METHODS = {
    "mpt": (MPT, {"length": 3, "rank": 2}),
    "attempt": (ATTEMPT, {"length": 3, "sources": SOURCES, "bottleneck": 4}),
    "transprompt": (TransPrompt, {"length": 3}),
}


@pytest.fixture(params=METHODS)
def module(request, backbone):
    """A method with a prompt for each task."""
    cls, arguments = METHODS[request.param]
    evaluation = EvaluationByTask({name: ClassificationEvaluation(task.names) for name, task in BY_TASK.items()})
    method = cls(**arguments, classes_by_task=BY_TASK, evaluation=evaluation, backbone=backbone.spec)
    method.attach(backbone)
    return perturb(method).eval()


def multitask_batch(codec, template="front"):
    return replace(batch_of(codec, TEMPLATES[template], labels=(0, 1, 1, 0)), task_ids=TASKS)


@pytest.mark.parametrize("template", TEMPLATES)
@torch.no_grad()
def test_logits_depend_neither_on_padding_nor_on_the_tasks_of_other_rows(module, backbone, template):
    codec = backbone.codec
    right, left = (multitask_batch(on_side(codec, side), template) for side in ("right", "left"))
    logits = module(right)
    assert_close(real(left, module(left)), real(right, logits), **CLOSE)
    for b, row in enumerate(encode_rows(codec, TEMPLATES[template])):
        alone = codec.collate([row], task_ids=TASKS[b : b + 1])
        expected = module(alone)
        assert_close(logits[b : b + 1, : expected.shape[1]], expected, **CLOSE)
        assert_close(module(more_padding(alone, 2, 3, codec.pad_id)), expected, **CLOSE)


@torch.no_grad()
def test_rows_of_several_tasks_get_the_same_answers_in_a_batch_and_alone(module, backbone, family):
    options = {} if family in MASKED else {"max_new_tokens": 4}
    batch = multitask_batch(backbone.codec)
    together = module.lm().generate(batch, **options)
    for b in range(len(batch)):
        alone = module.lm().generate(batch.only([b]), **options)[0]
        assert together[b, : len(alone)].tolist() == alone.tolist()


@torch.no_grad()
def test_the_prompt_does_not_depend_on_the_answer(module, backbone):
    expected = module.prompt(multitask_batch(backbone.codec)).tokens
    others = batch_of(backbone.codec, targets=("very long story", "good", "great", "is dull"))
    assert_close(module.prompt(replace(others, task_ids=TASKS)).tokens, expected)


def test_a_batch_of_several_tasks_trains_and_its_checkpoint_gives_the_same_logits(module, backbone, tmp_path):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    batch = multitask_batch(backbone.codec)
    start = {name: parameter.detach().clone() for name, parameter in trainable_parameters(module).items()}
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader([batch], batch_size=None)
    trainer.fit(module.train(), loader, loader)
    for name, value in start.items():
        assert not torch.equal(module.get_parameter(name), value), name
    assert {"val/macro", "val/mood/accuracy", "val/length/mcc"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    names = set(load_checkpoint(tmp_path / "run.ckpt")["state_dict"])
    assert names - {"sources"} == set(start)
    assert all(any(name.endswith(task) for name in names) for task in BY_TASK)
    loaded = type(module).load_from_checkpoint(tmp_path / "run.ckpt").eval()
    assert loaded.tasks == ("mood", "length")
    with torch.no_grad():
        assert torch.equal(loaded(batch), module.eval()(batch))
