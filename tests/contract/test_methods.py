"""What every method keeps, on every family of backbones."""

import logging

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny import (
    EOS,
    MASKED,
    SEQ2SEQ,
    TARGETS,
    TEMPLATES,
    TEXTS,
    batch_of,
    encode_rows,
    more_padding,
    on_side,
    real,
)
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.cli.commands.fold import fold
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import Folded, NoPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.objectives.language_modeling import LanguageModeling

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LABELS = (0, 1, 1, 0)


def trainer(*callbacks, **arguments):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def loader(batch):
    return DataLoader([batch], batch_size=None)


def with_task(method, backbone, classes):
    return method.on(backbone, classes=classes, evaluation=ClassificationEvaluation(classes.names))


def given(prompt):
    """What a prompt holds in the places where it acts, but for shifts, which not every token has."""
    tokens = [] if prompt.tokens is None else [prompt.tokens]
    deep = [t for layers in prompt.kv.values() for pair in layers.values() for t in pair]
    return [*tokens, *deep, *prompt.hidden.values()]


def trainable(module):
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def moved_from_start(module, far=1.0):
    """The module with other parameters than it was built with."""
    with torch.no_grad():
        for parameter in trainable(module).values():
            parameter.add_(torch.randn_like(parameter) * far)
    return module


class LastGradients(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {name: parameter.grad.clone() for name, parameter in trainable(pl_module).items()}


def test_every_parameter_learns_after_a_validation_pass_and_the_backbone_stays(method, family, load, classes):
    backbone = load(family)
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    module = with_task(method, backbone, classes)
    start = {name: parameter.detach().clone() for name, parameter in trainable(module).items()}
    module.train()
    batch, last = batch_of(backbone.codec, labels=LABELS), LastGradients()
    trainer(last, max_epochs=2, num_sanity_val_steps=1).fit(module, loader(batch), loader(batch))
    assert start
    for name, parameter in trainable(module).items():
        assert last.gradients[name].abs().sum() > 0, name
        assert not torch.equal(parameter, start[name]), name
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_every_soft_token_learns(method, backbone, classes):
    batch = batch_of(backbone.codec, labels=LABELS)
    prompt = with_task(method, backbone, classes).prompt(batch)
    parts = given(prompt)
    for part in parts:
        part.retain_grad()
    LanguageModeling()(PromptedLM(backbone, lambda _: prompt), batch).loss.backward()
    assert parts
    for part in parts:
        assert (part.grad.abs().sum(-1) > 0).all()


def test_the_backbone_stays_in_evaluation_mode(method, backbone):
    module = method.on(backbone).train()
    assert module.training
    assert not any(part.training for part in backbone.modules())
    batch = batch_of(backbone.codec)
    prompt = module.prompt(batch)  # which a method may draw in training
    assert torch.equal(backbone(batch, prompt), backbone(batch, prompt))


@pytest.mark.parametrize("template", TEMPLATES)
def test_logits_depend_neither_on_padding_nor_on_the_rest_of_the_batch(method, backbone, template):
    module, codec = method.on(backbone), backbone.codec
    right, left = (batch_of(on_side(codec, side), TEMPLATES[template]) for side in ("right", "left"))
    with torch.no_grad():
        logits = module(right)
        assert_close(real(left, module(left)), real(right, logits), **CLOSE)
        for b, row in enumerate(encode_rows(codec, TEMPLATES[template])):
            alone = codec.collate([row])
            expected = module(alone)
            assert_close(logits[b : b + 1, : expected.shape[1]], expected, **CLOSE)
            for sides in ((3, 0), (0, 4), (2, 3)):
                assert_close(module(more_padding(alone, *sides, codec.pad_id)), expected, **CLOSE)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_heard_wherever_it_stands(method, backbone, template):
    batch = batch_of(backbone.codec, TEMPLATES[template])
    lm = method.on(backbone).lm()
    with torch.no_grad():
        change = real(batch, lm(batch) - lm(batch, prompted=False)).abs().amax(-1)
    assert (change > 1e-3).all()


def assert_prompt_is_blind_to_answers(module, codec):
    """Answers as long as before, then longer ones."""
    said = module.prompt(batch_of(codec))
    for others in (("very long story", "good", "great", "is dull"), ("it is a film",) * len(TEXTS)):
        batch = batch_of(codec, targets=others)
        prompt = module.prompt(batch)
        assert prompt.blocks == said.blocks
        assert_close(given(prompt), given(said))
        if said.shift is not None:
            wide, before = (t.expand(len(batch), -1, -1) for t in (prompt.shift, said.shift))
            assert_close(wide[batch.source], before[batch_of(codec).source])


def test_the_prompt_does_not_depend_on_the_answer(method, backbone):
    assert_prompt_is_blind_to_answers(method.on(backbone), backbone.codec)


class Peeking(SoftPromptModule):
    """A soft token that is the mean of the row, answer included: what the contract forbids."""

    def build(self, backbone):
        self.scale = nn.Parameter(torch.ones(()))

    def prompt(self, batch):
        tokens = self.backbone.embed(batch.input_ids) * batch.mask[..., None]
        return SoftPrompt(tokens=self.scale * tokens.mean(1, keepdim=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_method_that_reads_answers_is_found_out(backbone):
    module = Peeking(backbone=backbone.spec)
    module.attach(backbone)
    with pytest.raises(AssertionError):
        assert_prompt_is_blind_to_answers(module, backbone.codec)


def test_the_first_target_does_not_depend_on_the_answer(method, backbone):
    module = method.on(backbone)
    others = ("very long story", "good", "great", "is dull")  # as long as the targets
    batch, other = batch_of(backbone.codec), batch_of(backbone.codec, targets=others)
    with torch.no_grad():
        assert_close(module(batch)[:, 0], module(other)[:, 0], **CLOSE)


@pytest.fixture
def saved(method, backbone, classes, tmp_path):
    """A module, the logits it gives, and the checkpoint that it left."""
    module = moved_from_start(with_task(method, backbone, classes))
    batch, run = batch_of(backbone.codec, labels=LABELS), trainer()
    run.validate(module, loader(batch), verbose=False)
    run.save_checkpoint(tmp_path / "run.ckpt")
    with torch.no_grad():
        return module, module(batch), tmp_path / "run.ckpt"


def test_a_checkpoint_holds_the_prompt_alone_and_gives_the_same_logits(saved, method, backbone):
    module, logits, path = saved
    assert set(load_checkpoint(path)["state_dict"]) == set(trainable(module)) | method.masks
    loaded = type(module).load_from_checkpoint(path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch_of(backbone.codec)), logits)


def test_a_renamed_key_is_an_error(saved):
    module, _, path = saved
    checkpoint = load_checkpoint(path)
    name, value = checkpoint["state_dict"].popitem()
    checkpoint["state_dict"][f"{name}_before"] = value
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError, match=f'(?s)run.ckpt contains other tensors.*Missing key.*"{name}".*Unexpected key.*"{name}_before"'
    ):
        type(module).load_from_checkpoint(path)


def test_a_checkpoint_of_another_backbone_is_an_error(saved, method, family, load, classes):
    _, _, path = saved
    module = with_task(method, load(family, seed=1), classes)
    batch = batch_of(module.loaded.codec, labels=LABELS)
    with pytest.raises(ValueError, match="trained on"):
        trainer().validate(module, loader(batch), ckpt_path=path, verbose=False)


def greedy(module, row, steps):
    """The likeliest token again and again, each from a forward pass over everything said before."""
    codec, said = module.loaded.codec, []
    while len(said) < steps and EOS not in said:
        batch = codec.collate([codec.with_answer(row, [*said, 0])])  # what stands at the last place cannot be seen
        said.append(int(module(batch)[0, len(said)].argmax()))
    return said


@torch.no_grad()
def test_generation_is_greedy_decoding_with_and_without_cache_alone_and_in_a_batch(method, family, backbone):
    module, codec = method.on(backbone), backbone.codec
    if family in MASKED:
        for batch in (batch_of(codec), batch_of(on_side(codec, "left"))):
            assert torch.equal(module.lm().generate(batch), module(batch).argmax(-1))
        return
    rows = encode_rows(codec, TEMPLATES["middle"])
    expected = [greedy(module, row, 5) for row in rows]
    alone = [module.lm().generate(codec.collate([row]), max_new_tokens=5)[0] for row in rows]
    batches = [on_side(codec, side).collate(rows) for side in ("right", "left")]
    caches = [{"use_cache": True}, {"use_cache": False}]
    together = [module.lm().generate(batch, max_new_tokens=5, **c) for batch in batches for c in caches]
    for said in (alone, *together):
        assert [ids.tolist()[: len(e)] for ids, e in zip(said, expected, strict=True)] == expected


@pytest.mark.parametrize("family", MASKED)
def test_a_masked_model_refuses_decoding_options(backbone):
    with pytest.raises(ValueError, match="num_beams"):
        backbone.generate(batch_of(backbone.codec), num_beams=3)


def test_a_bfloat16_backbone_trains_a_float32_prompt(method, family, backbone, load, classes):
    torch.manual_seed(0)
    exact = moved_from_start(with_task(method, backbone, classes), 0.1)
    torch.manual_seed(0)
    module = with_task(method, load(family, dtype="bfloat16"), classes)
    module.load_state_dict(exact.state_dict())
    batch = batch_of(backbone.codec, labels=LABELS)
    logits = module(batch)
    assert logits.dtype == torch.bfloat16
    loss, expected = (m.objective(m.lm(), batch).loss for m in (module, exact))
    loss.backward()
    assert_close(loss, expected, atol=0.1, rtol=0.05)
    for name, parameter in trainable(module).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def loss_and_gradients(module, batch):
    """Also how often the last attention ran."""
    *_, attention = (m for m in module.loaded.model.modules() if type(m).__name__.endswith("Attention"))
    module(batch)  # what a backbone tries out on first use is not counted
    calls = []
    handle = attention.register_forward_hook(lambda *_: calls.append(1))
    loss = LanguageModeling()(module.lm(), batch).loss
    loss.backward()
    handle.remove()
    return loss.detach(), {name: p.grad for name, p in trainable(module).items()}, len(calls)


@pytest.mark.parametrize("template", TEMPLATES)
def test_loss_and_gradients_are_those_of_plain_concatenation(method, family, pair, template):
    """However a batch runs, in float64."""
    ours, plain = (method.on(backbone).double() for backbone in pair)
    plain.load_state_dict(ours.state_dict())
    batch = batch_of(pair[0].codec, TEMPLATES[template])
    found, expected = (loss_and_gradients(module, batch)[:2] for module in (ours, plain))
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert_close(real(batch, ours(batch)), real(batch, plain(batch)), rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_changes_nothing(method, family, load):
    kept, recomputed = method.on(load(family)), method.on(load(family, checkpointing=True))
    recomputed.load_state_dict(kept.state_dict())
    batch = batch_of(kept.loaded.codec)
    *expected, calls = loss_and_gradients(kept, batch)
    *found, more_calls = loss_and_gradients(recomputed, batch)
    assert more_calls > calls
    assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_without_its_prompt_it_is_the_bare_backbone(method, family, backbone):
    batch = batch_of(backbone.codec)
    logits = method.on(backbone).lm()(batch, prompted=False)
    bare = NoPrompt(backbone=backbone.spec)
    bare.attach(backbone)
    assert_close(bare(batch), logits, **CLOSE)
    for b, row in enumerate(encode_rows(backbone.codec, TEMPLATES["front"])):
        ids = torch.tensor([row.ids])
        if family in SEQ2SEQ:
            expected = backbone.model(input_ids=ids, labels=torch.tensor([row.targets])).logits
        else:
            places = torch.tensor(row.answers) - int(family not in MASKED)  # causal: at the token before
            expected = backbone.model(input_ids=ids).logits[:, places]
        assert_close(logits[b : b + 1, : len(row.targets)], expected, **CLOSE)


def test_folded_it_gives_the_same_logits_or_says_why_it_cannot(method, backbone, tmp_path):
    module = moved_from_start(method.on(backbone))
    if not method.folds:
        with pytest.raises(ValueError, match="cannot be folded"):
            module.fold()
        return
    saved = SavedPrompt(module.state_dict(), backbone_identity(backbone), dict(module.hparams))
    write_prompt(tmp_path / "folded.safetensors", fold(module, saved))
    folded = Folded(path=str(tmp_path / "folded.safetensors"), backbone=backbone.spec)
    folded.attach(backbone)
    batch = batch_of(backbone.codec)
    with torch.no_grad():
        assert_close(real(batch, folded(batch)), real(batch, module(batch)), atol=5e-7, rtol=5e-7)
    assert trainable(folded)


def test_nothing_to_train_is_an_error_that_says_so(backbone):
    bare = NoPrompt(backbone=backbone.spec)
    bare.attach(backbone)
    assert not bare.trains
    with pytest.raises(ValueError, match="nothing to train"):
        bare.configure_optimizers()


def test_rows_have_targets_of_different_lengths():
    assert len({len(target.split()) for target in TARGETS}) > 1  # or padding of targets would go untested
