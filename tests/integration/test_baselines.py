"""The baselines: all gradients equal the gradients of transformers, and checkpoints restore the weights."""

from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from tiny import CLASSES, SEQ2SEQ, batch_of, encode_rows, real
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import FullFineTuning, LoRA
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec

LABELS = (0, 1, 1, 0)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def build_method(cls, backbone, **arguments):
    module = cls(
        backbone=backbone.spec, classes=CLASSES, evaluation=ClassificationEvaluation(CLASSES.names), **arguments
    )
    module.attach(backbone)
    return module


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_all_weights_have_the_gradients_that_transformers_gives_them(family, load):
    backbone = load(family)
    plain = deepcopy(backbone.model).requires_grad_()
    module = build_method(FullFineTuning, backbone)
    LanguageModeling()(module.lm(), batch_of(backbone.codec)).loss.backward()
    losses, count = [], 0
    for row in encode_rows(backbone.codec, "{soft}{text} it was {target}"):
        ids, targets = torch.tensor([row.ids]), torch.tensor([row.targets])
        labels = targets
        if family not in SEQ2SEQ:
            labels = torch.full_like(ids, IGNORE)
            labels[0, list(row.answers)] = targets[0]
        losses.append(plain(input_ids=ids, labels=labels).loss * len(row.targets))
        count += len(row.targets)
    (sum(losses) / count).backward()
    for name, weight in plain.named_parameters():
        assert_close(module.loaded.model.get_parameter(name).grad, weight.grad, **CLOSE)
    num_trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert num_trainable == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("cls", [FullFineTuning, LoRA])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_it_trains_and_its_checkpoint_restores_it(family, load, cls, tmp_path):
    backbone = load(family)
    batch = batch_of(backbone.codec, labels=LABELS)
    with torch.no_grad():
        bare = real(batch, backbone(batch))
    module = build_method(cls, backbone)
    with torch.no_grad():
        assert_close(real(batch, module(batch)), bare)
    loader = DataLoader([batch] * 4, batch_size=None)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    before = float(module.step(batch)["loss"])
    trainer.fit(module, loader, loader)
    assert float(module.step(batch)["loss"]) < before
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with torch.no_grad():
        trained = real(batch, module(batch))
        restored = build_method(cls, load(family))
        trainer.validate(restored, loader, ckpt_path=tmp_path / "run.ckpt", verbose=False)
        assert torch.equal(real(batch, restored(batch)), trained)
    assert (trained - bare).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "layer"), [("llama", "embed_tokens"), ("gpt2", "wte"), ("bert", "layer.0")])
def test_only_the_named_layers_are_trained(family, layer, load):
    module = build_method(FullFineTuning, load(family), layers=[layer])
    model = module.loaded.model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if f".{layer}." in name}
    assert {name.replace("/", ".") for name in module.weights} == trained
    LanguageModeling()(module.lm(), batch_of(module.loaded.codec)).loss.backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())


def test_a_layer_that_does_not_exist_is_refused(load):
    with pytest.raises(ValueError, match=r"no layer of LlamaForCausalLM ends with 'tokens'; .*'embed_tokens'"):
        build_method(FullFineTuning, load("llama"), layers=["tokens"])
    with pytest.raises(ValueError, match="layers must be a list"):
        FullFineTuning(layers="embed_tokens")


class Iterates(Callback):
    """Records the weights after each step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append([weight.detach().clone() for weight in module.weights.values()])


def test_weight_averaging_validates_and_returns_the_mean_of_all_steps(load):
    batch = batch_of(load("llama").codec, labels=LABELS)
    module = build_method(FullFineTuning, load("llama"), layers=["embed_tokens", "norm"])
    iterates = Iterates()
    trainer = Trainer(
        accelerator="cpu", max_steps=4, val_check_interval=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[iterates, WeightAveraging(use_buffers=False)],
    )  # fmt: skip
    loader = DataLoader([batch] * 4, batch_size=None)
    trainer.fit(module, loader, loader)
    assert len(iterates.weights) == 4
    for weight, *steps in zip(module.weights.values(), *iterates.weights, strict=True):
        assert_close(weight, torch.stack(steps).mean(0), **CLOSE)
        assert not torch.equal(weight, steps[-1])
    module.eval()
    assert_close(trainer.callback_metrics["val/loss"], module.objective(module.lm(), batch).loss.detach(), **CLOSE)


def test_replicas_do_not_share_a_backbone_that_changes(load):
    with pytest.raises(ValueError, match="LoRA changes the backbone"):
        Replicas(LoRA(backbone=load("llama").spec), ReplicaSpec(2))
