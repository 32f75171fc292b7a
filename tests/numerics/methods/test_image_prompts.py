"""Prompts of images and texts, compared with loops over the layers of CLIP, one image and one class at a time."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy, relu
from torch.testing import assert_close
from transformers import CLIPConfig

from lightning_softprompt.backbones.skeleton import Skeleton
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch, Classes, SoftPrompt
from lightning_softprompt.methods import CoCoOp, CoOp, MaPLe, NoPrompt, PromptTuning, VisualPromptTuning
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.prompts.init import FromText, Normal

FAMILIES = ("clip",)
WORDS = ("dog", "film", "good film")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def classes_of(template):
    return Classes({word: [word] for word in WORDS}, template)


def attach(method, backbone):
    method.attach(backbone)
    return tiny.perturb(method.eval(), 0.2)


def text_feature(backbone, before, soft, after, deep=()):
    """The feature [F] of one text: words, soft tokens [P, H] and words; `deep` are the soft tokens of later layers."""
    model, codec = backbone.model, backbone.codec
    parts = [*codec.start, *codec.ids(before)], [*codec.ids(after), *codec.end]
    first, last = (backbone.embed(torch.tensor([part], dtype=torch.long))[0] for part in parts)
    row = torch.cat([first, soft, last])
    states = (row + model.text_model.embeddings.position_embedding.weight[: len(row)])[None]
    mask = torch.full((len(row), len(row)), float("-inf")).triu(1)[None, None]
    for number, layer in enumerate(model.text_model.encoder.layers):
        if 0 < number <= len(deep):
            before, after = states[:, : len(first)], states[:, -len(last) :]
            states = torch.cat([before, deep[number - 1][None], after], dim=1)
        states = layer(states, mask)
    feature = model.text_projection(model.text_model.final_layer_norm(states[0, -1]))
    return feature / feature.norm()


def image_feature(backbone, pixels, soft=None, deep=()):
    """The feature [F] of one image; soft tokens [P, G] follow the patches, `deep` are those of later layers."""
    tower = backbone.model.vision_model
    states = tower.embeddings(pixels[None])
    if soft is not None:
        states = torch.cat([states, soft[None]], dim=1)
    states = tower.pre_layrnorm(states)
    for number, layer in enumerate(tower.encoder.layers):
        if 0 < number <= len(deep):
            states = torch.cat([states[:, : -len(deep[number - 1])], deep[number - 1][None]], dim=1)
        states = layer(states, None)
    feature = backbone.model.visual_projection(tower.post_layernorm(states[0, 0]))
    return feature / feature.norm()


def loop_over(backbone, batch, text_of, image_of):
    """Scores [B, C]: the similarity of each image and each class, computed alone."""
    scale = backbone.model.logit_scale.exp()
    rows = []
    for pixels in batch.images:
        image = image_of(pixels)
        rows.append(torch.stack([scale * image @ text_of(number, word, image) for number, word in enumerate(WORDS)]))
    return torch.stack(rows)


def assert_equal_to_loop(module, backbone, text_of, image_of):
    """Compares scores and gradients of the cross-entropy."""
    batch = tiny.image_batch(backbone.codec, labels=(0, 1, 2, 1))
    scores = module.lm().scores(batch)
    expected = loop_over(backbone, batch, text_of, image_of)
    assert_close(scores, expected, **CLOSE)
    parameters = list(trainable_parameters(module).values())
    gradients = torch.autograd.grad(cross_entropy(scores, batch.labels), parameters)
    expected_gradients = torch.autograd.grad(cross_entropy(expected, batch.labels), parameters)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient, **CLOSE)


def test_coop_of_word_embeddings_is_the_text_of_these_words(backbone):
    """Gold identity: the context `a story about` as soft tokens, and as words."""
    hard = NoPrompt(backbone=backbone.spec, classes=classes_of("a story about {target} ."))
    soft = CoOp(3, init=FromText("a story about"), backbone=backbone.spec, classes=classes_of("{soft}{target} ."))
    batch = tiny.image_batch(backbone.codec)
    for method in (hard, soft):
        method.attach(backbone)
    with torch.no_grad():
        assert_close(soft.lm().scores(batch), hard.lm().scores(batch), **CLOSE)


@pytest.mark.parametrize("position", ["front", "middle", "end"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_coop(backbone, position, class_specific):
    template = {"end": "{soft}{target} .", "middle": "{soft}{target}{soft} .", "front": "{target}{soft} ."}[position]
    length = [2, 1] if position == "middle" else 3
    classes = classes_of(template)
    method = CoOp(length, class_specific, init=Normal(), backbone=backbone.spec, classes=classes)
    module = attach(method, backbone)

    def text_of(number, word, image):
        tokens = module.tokens[number] if class_specific else module.tokens
        if position == "end":
            return text_feature(backbone, "", tokens, f"{word} .")
        if position == "front":
            return text_feature(backbone, word, tokens, ".")
        ids = torch.tensor([backbone.codec.ids(word)])
        return text_feature(backbone, "", torch.cat([tokens[:2], backbone.embed(ids)[0], tokens[2:]]), ".")

    assert_equal_to_loop(module, backbone, text_of, lambda pixels: image_feature(backbone, pixels))


def test_cocoop(backbone):
    method = CoCoOp(2, reduction=4, init=Normal(), backbone=backbone.spec, classes=classes_of("{soft}{target} ."))
    module = attach(method, backbone)
    down, _, up = module.network

    def text_of(number, word, image):
        shift = up.weight @ relu(down.weight @ image + down.bias) + up.bias
        return text_feature(backbone, "", module.tokens + shift, f"{word} .")

    assert_equal_to_loop(module, backbone, text_of, lambda pixels: image_feature(backbone, pixels))


def test_cocoop_without_its_network_is_coop(backbone):
    common = {"backbone": backbone.spec, "classes": classes_of("{soft}{target} .")}
    conditional, unified = CoCoOp(2, reduction=4, **common), CoOp(2, init=FromText("a photo of a"), **common)
    batch = tiny.image_batch(backbone.codec)
    for method in (conditional, unified):
        method.attach(backbone)
    with torch.no_grad():
        unified.tokens.copy_(conditional.tokens)
        for parameter in conditional.network[2].parameters():
            parameter.zero_()
        assert_close(conditional.lm().scores(batch), unified.lm().scores(batch), **CLOSE)


@pytest.mark.parametrize("layers", [1, 2])
def test_visual_prompt_tuning(backbone, layers):
    classes = classes_of("a story about {target} .")
    module = attach(VisualPromptTuning(2, layers, backbone=backbone.spec, classes=classes), backbone)
    none = torch.zeros(0, backbone.hidden_size)
    assert_equal_to_loop(
        module,
        backbone,
        lambda number, word, image: text_feature(backbone, "a story about", none, f"{word} ."),
        lambda pixels: image_feature(backbone, pixels, module.tokens[0], module.tokens[1:]),
    )


def test_maple(backbone):
    method = MaPLe(2, layers=2, init=Normal(), backbone=backbone.spec, classes=classes_of("{soft}{target} ."))
    module = attach(method, backbone)
    in_images = [
        tokens @ linear.weight.T + linear.bias for tokens, linear in zip(module.tokens, module.maps, strict=True)
    ]
    assert_equal_to_loop(
        module,
        backbone,
        lambda number, word, image: text_feature(backbone, "", module.tokens[0], f"{word} .", module.tokens[1:]),
        lambda pixels: image_feature(backbone, pixels, in_images[0], in_images[1:]),
    )


def test_states_that_differ_by_text_are_replaced_in_each_text(backbone):
    """Deep soft tokens [R, P, H] of each text, which share their first layer."""
    row = backbone.codec.encode(tiny.Template("{soft}a film {target} .").pieces({}), "good")
    batch = backbone.codec.collate([row, row])
    first, deep = torch.randn(1, 2, 32), torch.randn(2, 2, 32)
    with torch.no_grad():
        features = backbone.text_features(batch, SoftPrompt(tokens=first, deep={1: deep}))
        for feature, states in zip(features, deep, strict=True):
            assert_close(feature, text_feature(backbone, "", first[0], "a film good .", states[None]), **CLOSE)


def test_a_prompt_that_is_a_patch_is_this_patch_twice(backbone):
    batch = tiny.image_batch(backbone.codec)
    embeddings = backbone.model.vision_model.embeddings
    with torch.no_grad():
        patch = embeddings(batch.images)[:, 1:2]
        prompted = backbone.image_features(batch, SoftPrompt(tokens=patch))
        handle = embeddings.register_forward_hook(lambda _, args, out: out[:, [0, 1, 1, 2, 3, 4]])
        expected = backbone.image_features(replace(batch, image_keys=()))
        handle.remove()
    assert_close(prompted, expected, **CLOSE)


def test_a_prompt_that_was_trained_on_some_classes_scores_others(backbone):
    trained = attach(CoOp(2, backbone=backbone.spec, classes=classes_of("{soft}{target} .")), backbone)
    others = Classes({"sad": ["sad"], "bad": ["bad"]}, "{soft}{target} .")
    module = CoOp(2, backbone=backbone.spec, classes=others)
    module.attach(backbone)
    module.load_state_dict(trained.state_dict())
    batch = tiny.image_batch(backbone.codec)
    with torch.no_grad():
        features = [text_feature(backbone, "", trained.tokens, f"{word} .") for word in ("sad", "bad")]
        expected = backbone.scores(backbone.image_features(batch), torch.stack(features))
        assert_close(module.lm().scores(batch), expected, **CLOSE)


def test_features_of_images_are_computed_once(load):
    backbone = load("clip")
    batch = tiny.image_batch(backbone.codec)
    calls = []
    backbone.image_tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        first = backbone.image_features(batch.only([0, 1]))
    again = backbone.image_features(batch)  # in training; only two images are new
    assert len(calls) == 2
    assert_close(again[:2], first)
    backbone.image_features(batch)
    assert len(calls) == 2
    assert_close(backbone.image_features(replace(batch, image_keys=())), again, **CLOSE)


def test_text_features_are_computed_once_per_step_and_once_per_evaluation(backbone):
    module = attach(PromptTuning(2, backbone=backbone.spec, classes=classes_of("{soft}{target} .")), backbone)
    calls = []
    handle = backbone.stack.final_layer_norm.register_forward_hook(lambda *_: calls.append(1))
    batch = tiny.image_batch(backbone.codec, labels=(0, 1, 2, 1))
    module.step(batch)
    assert len(calls) == 1
    with torch.no_grad():
        scores = [module.lm().scores(batch.only([b])) for b in range(len(batch))]
    assert len(calls) == 2
    with torch.no_grad():
        module.tokens.neg_()
        assert (module.lm().scores(batch.only([0])) - scores[0]).abs().max() > 1e-4
    handle.remove()


def test_numbers_of_parameters_are_those_of_the_papers():
    """ViT-B/16: width 512 of texts, 768 of images, 512 features."""
    config = CLIPConfig(vision_config={"hidden_size": 768, "patch_size": 16})
    backbone = Skeleton(BackboneSpec("no/weights"), config).full_size
    sizes = {}
    for method in (CoOp(16), CoCoOp(), MaPLe(), VisualPromptTuning(8, None), CoOp(4, class_specific=True)):
        method.classes = Classes({str(number): ["a"] for number in range(100)}, "{soft}{target}.")
        method.build_on(backbone)
        sizes[type(method).__name__] = sum(p.numel() for p in trainable_parameters(method).values())
    assert sizes == {"CoOp": 204_800, "CoCoOp": 35_360, "MaPLe": 3_555_072, "VisualPromptTuning": 12 * 8 * 768}


def test_a_batch_without_images_is_an_error(backbone):
    row = backbone.codec.encode(tiny.Template("{soft}a {target}").pieces({}), "dog")
    batch: Batch = backbone.codec.collate([row])
    with pytest.raises(ValueError, match="ImageClassificationDataModule"):
        backbone.image_features(batch)
