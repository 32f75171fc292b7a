import logging

import numpy as np
import pytest
import torch
from labelled_rows import LABELS
from lightning.pytorch import Trainer

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.curricula.competence import Competence
from lightning_softprompt.data.curricula.easy_to_hard import EasyToHard
from lightning_softprompt.data.curricula.self_paced import SelfPaced
from lightning_softprompt.data.difficulty import row_losses
from lightning_softprompt.data.difficulty.losses import BareLoss, InstructionDifficulty
from lightning_softprompt.data.difficulty.tokens import TargetTokens
from lightning_softprompt.data.multitask import MultitaskDataModule
from lightning_softprompt.methods.input_prompts.prompt_tuning import PromptTuning

TEXTS = ("a warm and funny film", "dull", "it is a sad story about a dog that never ends well", "this film , good ?")
TRAIN = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS * 3)]


@pytest.fixture
def make_data(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(row_losses, "cache_folder", lambda *parts: tmp_path.joinpath(*parts))
    spec = BackboneSpec(name=str(tiny_folder("llama")))

    def make_data(curriculum, **arguments):
        defaults = {"labels": LABELS, "train": TRAIN, "validation": TRAIN[:2], "batch_size": 2}
        return ClassificationDataModule(backbone=spec, curriculum=curriculum, **defaults | arguments)

    return make_data


def expected_losses(data, examples):
    """Returns the loss of each row, one by one."""
    backbone = load_backbone(data.spec)
    losses = []
    for example in examples:
        row = data._encoder.encode(example)
        batch = data.collate([(0, row, example)])
        losses.append(float(backbone.cross_entropy(batch).sum() / len(row.targets)))
    return np.array(losses)


def test_losses_of_the_bare_backbone_are_measured_once_and_stored(make_data, caplog):
    data = make_data(EasyToHard(BareLoss()))
    caplog.set_level(logging.INFO)
    orders = [list(make_data(EasyToHard(BareLoss())).train_dataloader().batch_sampler) for _ in range(2)]
    assert orders[0] == orders[1]
    assert sum("without prompt" in record.message for record in caplog.records) == 1
    losses = expected_losses(data, data.split("train").examples)
    rows = [row for batch in orders[0] for row in batch]
    assert np.allclose(losses[rows], sorted(losses), atol=1e-5)


def test_instruction_difficulty_divides_by_the_loss_with_empty_columns(make_data):
    data = make_data(Competence(InstructionDifficulty()))
    rows = data.split("train")
    with_text = expected_losses(data, rows.examples)
    without = expected_losses(data, [row_losses._empty_columns(example) for example in rows.examples])
    order = data.train_dataloader().batch_sampler.row_order.ranked(0)
    ratios = with_text / without
    assert np.allclose(ratios[order], sorted(ratios), atol=1e-5)


def test_self_paced_measures_losses_with_the_prompt_of_the_training_and_leaves_the_training_unchanged(make_data):
    """A growing threshold that admits every row from the start trains like no curriculum, step by step."""
    finals = []
    for curriculum in (None, SelfPaced(threshold=1e6)):
        torch.manual_seed(0)
        data = make_data(curriculum)
        module = PromptTuning(data=data, length=3, prompt_dropout=0.1, lr=0.1)
        trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                          enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False)  # fmt: skip
        trainer.fit(module, data)
        finals.append(module.current_prompt().tokens)
    assert torch.equal(finals[0], finals[1])
    losses = trainer.train_dataloader.batch_sampler.row_order._losses
    assert not np.allclose(losses, expected_losses(data, data.split("train").examples), atol=1e-3)


def test_settings_that_contradict_a_curriculum_are_refused(make_data):
    with pytest.raises(ValueError, match="remove batch_tokens"):
        make_data(EasyToHard(TargetTokens()), batch_tokens=100)
    with pytest.raises(ValueError, match="curriculum and balanced"):
        make_data(EasyToHard(TargetTokens()), balanced=True).train_dataloader()
    with pytest.raises(ValueError, match="SelfPaced requires a single task"):
        MultitaskDataModule({"one": make_data(SelfPaced()), "two": make_data(None)})
    with pytest.raises(ValueError, match="require a Trainer"):
        next(iter(make_data(SelfPaced()).train_dataloader()))
