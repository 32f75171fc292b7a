"""Requirements of methods on backbones that compare images with texts.

What predicts words does not apply to these backbones: logits of targets, language modeling, generation, soft tokens
that enter at a middle layer only, demonstrations, new tokens, and heads on the states of a text.
"""

from dataclasses import replace

import pytest
import tiny
import torch
from torch.testing import assert_close

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.cli.commands.fold import fold
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import Folded, NoPrompt
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.objectives.penalties import UniformNorm, scale_tokens

FAMILIES = tiny.CONTRASTIVE
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = ("coop", "cocoop", "vpt_deep", "maple", "prefix_tuning", "dept")  # one method for each kind of prompt


@pytest.fixture
def classes():
    """Three classes; the first has two label words."""
    return replace(tiny.CLASSES, template="{soft}a story about {target} .")


def attach(method, backbone, classes, **common):
    torch.manual_seed(1)
    return method.on(backbone, classes=classes, **common)


def scores(module, batch):
    return module.lm().scores(batch)


def test_training_changes_the_prompt_and_only_the_prompt(method, backbone, classes):
    module = tiny.perturb(attach(method, backbone, classes), 0.1)
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    batch = tiny.image_batch(backbone.codec, labels=(0, 1, 2, 1))
    parameters = trainable_parameters(module)
    with torch.inference_mode():
        scores(module, batch)  # a validation, whose tensors a later step must not use
    module.train().step(batch)["loss"].backward()
    for name, parameter in parameters.items():
        assert parameter.grad.abs().sum() > 0, name
    torch.optim.SGD(parameters.values(), lr=1.0).step()
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_scores_of_an_image_do_not_depend_on_other_images(method, backbone, classes):
    module = tiny.perturb(attach(method, backbone, classes), 0.1)
    batch = tiny.image_batch(module.loaded.codec)
    with torch.no_grad():
        expected = scores(module, batch)
        alone = torch.cat([scores(module, batch.only([b])) for b in range(len(batch))])
    assert_close(alone, expected, **CLOSE)
    assert expected.shape == (len(batch), len(classes))
    assert (expected[0] - expected[1]).abs().max() > 1e-5


@pytest.mark.methods(*KINDS)
def test_gradients_are_those_of_a_plain_forward_pass(method, family, backbone, load_once, classes):
    """Packed texts and cached images, and padded texts with images that run in each step."""
    module = tiny.perturb(attach(method, backbone, classes), 0.1)
    plain = tiny.perturb(attach(method, load_once(family, packed=False), classes), 0.1)
    plain.load_state_dict(module.state_dict())
    batch = tiny.image_batch(backbone.codec, labels=(0, 1, 2, 1))
    losses = [module.step(batch)["loss"] for _ in range(2)]  # the second one reads the cache
    loss = plain.step(replace(batch, image_keys=()))["loss"]
    assert losses[0] == losses[1]
    assert_close(losses[1], loss, **CLOSE)
    losses[1].backward()
    loss.backward()
    for name, parameter in trainable_parameters(module).items():
        assert_close(parameter.grad, trainable_parameters(plain)[name].grad, **CLOSE)


@pytest.mark.methods(*KINDS)
def test_a_folded_prompt_gives_the_same_scores_or_is_refused(method, backbone, classes, tmp_path):
    module = tiny.perturb(attach(method, backbone, classes), 0.1)
    if not method.folds:
        with pytest.raises(ValueError, match=r"cannot be folded|require images"):
            module.fold()
        return
    saved = SavedPrompt(module.state_dict(), backbone_identity(backbone), dict(module.hparams))
    write_prompt(tmp_path / "folded.safetensors", fold(module, saved))
    folded = Folded(path=str(tmp_path / "folded.safetensors"), backbone=backbone.spec, classes=classes)
    folded.attach(backbone)
    batch = tiny.image_batch(backbone.codec)
    with torch.no_grad():
        assert_close(scores(folded.eval(), batch), scores(module, batch), **CLOSE)


@pytest.mark.methods(*KINDS, families=("clip",))
def test_a_bfloat16_backbone_trains_a_float32_prompt(method, family, backbone, load_once, classes):
    exact = tiny.perturb(attach(method, backbone, classes), 0.1)
    module = attach(method, load_once(family, dtype="bfloat16"), classes)
    module.load_state_dict(exact.state_dict())
    batch = tiny.image_batch(backbone.codec, labels=(0, 1, 2, 1))
    loss = module.step(batch)["loss"]
    loss.backward()
    assert_close(loss, exact.step(batch)["loss"], atol=0.1, rtol=0.1)
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable_parameters(module).values())


@pytest.mark.methods("coop", "maple", families=("clip",))
def test_recomputed_layers_change_nothing(method, family, backbone, load_once, classes):
    module = attach(method, backbone, classes)
    recomputing = attach(method, load_once(family, checkpointing=True), classes)
    batch = tiny.image_batch(backbone.codec, labels=(0, 1, 2, 1))
    for each in (module, recomputing):
        each.step(batch)["loss"].backward()
    for name, parameter in trainable_parameters(module).items():
        assert_close(parameter.grad, trainable_parameters(recomputing)[name].grad, **CLOSE)


@pytest.mark.methods("coop", "coop_specific", "cocoop", "dept", families=("clip",))
def test_penalties_and_corruption_reach_the_texts_of_classes(method, backbone, classes):
    module = attach(method, backbone, classes, penalties=UniformNorm(relative=False, schedule="constant"))
    batch = tiny.image_batch(backbone.codec, labels=(0, 1, 2, 1))
    penalty = module.step(batch)["penalty/uniformnorm"]
    tokens = module.prompt(batch).tokens
    assert_close(penalty, tokens.norm(dim=-1).mean())
    with torch.no_grad():
        expected = scores(module, batch)
        unchanged = scale_tokens(module.lm(), batch, [0], 1.0).scores(batch)
        corrupted = scale_tokens(module.lm(), batch, [0], 0.0).scores(batch)
    assert_close(unchanged, expected, **CLOSE)
    assert (corrupted - expected).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["clip"])
def test_what_predicts_words_is_refused(backbone, classes):
    batch = tiny.image_batch(backbone.codec)
    for run in (backbone, backbone.cross_entropy, backbone.generate):
        with pytest.raises(ValueError, match="predicts no words"):
            run(batch)
    with pytest.raises(ValueError, match="middle layer"):
        backbone.text_features(batch, SoftPrompt(hidden={1: torch.zeros(1, 1, 32)}))


@pytest.mark.parametrize("family", ["llama"])
def test_prompts_of_images_are_refused_by_language_models(backbone):
    with pytest.raises(ValueError, match="compares images with texts"):
        backbone(tiny.batch_of(backbone.codec), SoftPrompt(image=SoftPrompt()))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_prompt_scores_are_those_of_transformers(backbone, classes):
    bare = NoPrompt(backbone=backbone.spec, classes=classes)
    bare.attach(backbone)
    batch = tiny.image_batch(backbone.codec)
    texts = bare.readout.texts
    ids = torch.full((len(texts), tiny.WINDOW), backbone.codec.pad_id)
    for row, encoded in zip(ids, texts.encoded, strict=True):
        row[: len(encoded.ids)] = torch.tensor(encoded.ids)
    with torch.no_grad():
        output = backbone.model(input_ids=ids, pixel_values=batch.images)
        words = output.text_embeds / output.text_embeds.norm(dim=-1, keepdim=True)
        positive = words[:2].mean(0) / words[:2].mean(0).norm()  # the class with two label words
        expected = backbone.scores(output.image_embeds, torch.stack([positive, words[2], words[3]]))
        assert_close(scores(bare, batch), expected, **CLOSE)
        assert_close(scores(bare, batch)[:, 1:], output.logits_per_image[:, 2:], **CLOSE)


@pytest.mark.parametrize("family", ["clip"])
def test_a_method_that_is_not_for_images_has_no_image_prompt(backbone):
    assert PromptedLM(backbone, lambda batch: SoftPrompt()).prompt(tiny.image_batch(backbone.codec)).image is None
