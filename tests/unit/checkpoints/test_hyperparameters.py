from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tiny import CLASSES, batch_of
from torch.optim import SGD, AdamW

from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.checkpoints.hyperparameters import to_plain
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.prompts.init import ClassLabels, FromText, Normal
from lightning_softprompt.readouts.calibrated import Calibrated
from lightning_softprompt.readouts.label_words import LabelWords
from lightning_softprompt.readouts.ranked import RankedChoices

FAMILIES = ("llama",)
INIT = "lightning_softprompt.prompts.init"
LOADERS = pytest.mark.parametrize("cls", [SoftPromptModule, PromptTuning, LightningModule])


@pytest.mark.parametrize("value", [None, True, 3, 0.5, "text", [1, [2]], {"a": {"b": None}}])
def test_plain_values_do_not_change(value):
    assert to_plain(value) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Path("a/b"), "a/b"),
        ((1, 2), [1, 2]),
        ({1: (2,)}, {"1": [2]}),
        (Normal(0.5), {"class_path": f"{INIT}.Normal", "init_args": {"std": 0.5}}),
        (Normal, {"class_path": f"{INIT}.Normal"}),
        (partial(SGD, lr=0.1), {"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.1}}),
        (
            {"init": ClassLabels(("a", "b"))},
            {"init": {"class_path": f"{INIT}.ClassLabels", "init_args": {"labels": ["a", "b"]}}},
        ),
    ],
)
def test_objects_have_the_form_of_a_config(value, expected):
    assert to_plain(value) == expected


@pytest.mark.parametrize("value", [lambda p: AdamW(p, lr=0.1), object(), torch.ones(2), partial(lambda p: p)])
def test_a_value_that_a_config_cannot_express_is_an_error_with_advice(value):
    with pytest.raises(ValueError, match=r"pass a class or functools\.partial\(AdamW, lr=0.1\) instead of a lambda"):
        to_plain([value])


def test_a_lambda_as_an_argument_of_a_method_is_an_error():
    with pytest.raises(ValueError, match=r"functools\.partial"):
        PromptTuning(optimizer=lambda p: AdamW(p, lr=0.1))


@pytest.fixture
def save(backbone, tmp_path):
    """A function that saves a checkpoint of a module with arguments, whose prompt differs from its initial value."""

    def save_checkpoint(**arguments):
        module = PromptTuning(backbone=backbone.spec, **arguments)
        module.attach(backbone)
        with torch.no_grad():
            module.tokens.add_(1.0)
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return module, tmp_path / "run.ckpt"

    return save_checkpoint


@LOADERS
def test_a_checkpoint_restores_its_module(save, cls):
    module, path = save(length=5, init=FromText("it is"))
    loaded = cls.load_from_checkpoint(path)
    assert type(loaded) is PromptTuning
    assert (loaded.length, loaded.init, loaded.spec) == (5, module.init, module.spec)
    assert isinstance(loaded.objective, LanguageModeling)
    assert torch.equal(loaded.tokens, module.tokens)


@LOADERS
@pytest.mark.parametrize(
    "readout",
    [
        LabelWords,
        partial(LabelWords, aggregate="max"),
        partial(RankedChoices, normalize="tokens", premise="the label is {target}"),
        partial(Calibrated, fillers=["what ?"]),
    ],
    ids=["class", "class with an argument", "ranked", "calibrated"],
)
def test_readout_classes_and_objective_are_restored(save, cls, readout):
    module, path = save(length=2, readout=readout, classes=CLASSES, objective=Classification(label_smoothing=0.1))
    loaded = cls.load_from_checkpoint(path)
    batch = batch_of(module.loaded.codec)
    assert loaded.objective == Classification(label_smoothing=0.1)
    assert dict(loaded.classes.words) == dict(CLASSES.words)
    assert loaded.classes.template == CLASSES.template
    assert type(loaded.readout) is type(module.readout)
    with torch.no_grad():
        assert torch.equal(loaded.lm().scores(batch), module.lm().scores(batch))


@LOADERS
def test_optimizer_and_schedule_are_restored(save, cls):
    _, path = save(
        length=2,
        optimizer=partial(SGD, lr=0.3, momentum=0.5),
        scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
        penalty_weights={"norm": 0.1},
    )
    loaded = cls.load_from_checkpoint(path)
    (optimizer,), (schedule,) = loaded.configure_optimizers()
    assert isinstance(optimizer, SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.3, 0.5)
    assert (schedule["scheduler"].gamma, schedule["interval"]) == (0.9, "step")
    assert loaded.training_loss.weights == {"norm": 0.1}


def test_the_default_optimizer_has_a_high_rate_and_no_decay(save):
    module, _ = save(length=2)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, AdamW)
    assert optimizer.defaults["lr"] >= 1e-3
    assert optimizer.defaults["weight_decay"] == 0


def test_hyper_parameters_are_plain_values(save):
    _, path = save(length=2, readout=LabelWords, classes=CLASSES, init=Normal(), optimizer=partial(SGD, lr=0.3))
    values = load_checkpoint(path)["hyper_parameters"]  # unpickles no class
    assert to_plain(dict(values)) == dict(values)
    assert "evaluation" not in values


def test_the_default_backbone_is_the_packaged_one():
    assert PromptTuning().spec == BackboneSpec() == BackboneSpec(name="smollm2-135m-instruct")
