"""Requirements of every method on every family of backbones."""

import logging
from functools import partial

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
    list_answers,
    more_padding,
    on_side,
    perturb,
    real,
)
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.dialogue import DialogueEncoder
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.cli.commands.fold import fold
from lightning_softprompt.core.chat_format import ChatFormat, Turn
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import Folded, NoPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.objectives.language_modeling import LanguageModeling

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LABELS = (0, 1, 1, 0)


def make_trainer(*callbacks, **arguments):
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


def loader_of(batch):
    return DataLoader([batch], batch_size=None)


def build_classifier(method, backbone, classes):
    return method.on(backbone, classes=classes, evaluation=ClassificationEvaluation(classes.names))


def prompt_tensors(prompt):
    """Returns the soft tokens, keys, values and hidden states of a prompt, without shifts, which some tokens lack."""
    tensors = [] if prompt.tokens is None else [prompt.tokens]
    for layers in prompt.kv.values():
        for key_and_value in layers.values():
            tensors += key_and_value
    return [*tensors, *prompt.hidden.values()]


class LastGradients(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {name: parameter.grad.clone() for name, parameter in trainable_parameters(pl_module).items()}


def test_training_changes_only_the_prompt_and_a_checkpoint_contains_only_the_prompt(
    method, backbone, classes, tmp_path
):
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    module = build_classifier(method, backbone, classes)
    start = {name: parameter.detach().clone() for name, parameter in trainable_parameters(module).items()}
    module.train()
    batch, last = batch_of(backbone.codec, labels=LABELS), LastGradients()
    trainer = make_trainer(last, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, loader_of(batch), loader_of(batch))
    assert start
    for name, parameter in trainable_parameters(module).items():
        assert last.gradients[name].abs().sum() > 0, name
        assert not torch.equal(parameter, start[name]), name
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert all(parameter.grad is None for parameter in backbone.parameters())
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    assert set(load_checkpoint(path)["state_dict"]) == set(trainable_parameters(module)) | method.masks
    loaded = type(module).load_from_checkpoint(path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch), module.eval()(batch))


def test_every_soft_token_learns(method, backbone, classes):
    batch = batch_of(backbone.codec, labels=LABELS)
    prompt = build_classifier(method, backbone, classes).prompt(batch)
    parts = prompt_tensors(prompt)
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


@pytest.mark.rotate(template=TEMPLATES)
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
            assert_close(module(more_padding(alone, 2, 3, codec.pad_id)), expected, **CLOSE)


@pytest.mark.rotate(template=TEMPLATES)
def test_the_prompt_changes_the_logits_at_every_position(method, backbone, template):
    batch = batch_of(backbone.codec, TEMPLATES[template])
    lm = method.on(backbone).lm()
    with torch.no_grad():
        change = real(batch, lm(batch) - lm(batch, prompted=False)).abs().amax(-1)
    assert (change > 1e-3).all()


def assert_prompt_ignores_answers(module, codec):
    """Compares the prompts of rows that differ in their answers, with equal and with greater length."""
    first_batch = batch_of(codec)
    expected = module.prompt(first_batch)
    for others in (("very long story", "good", "great", "is dull"), ("it is a film",) * len(TEXTS)):
        batch = batch_of(codec, targets=others)
        prompt = module.prompt(batch)
        assert prompt.blocks == expected.blocks
        assert_close(prompt_tensors(prompt), prompt_tensors(expected))
        if expected.shift is not None:
            shift, expected_shift = (each.shift.expand(len(batch), -1, -1) for each in (prompt, expected))
            assert_close(shift[batch.source], expected_shift[first_batch.source])


def test_the_prompt_does_not_depend_on_the_answer(method, backbone):
    assert_prompt_ignores_answers(method.on(backbone), backbone.codec)


def encode_dialogue(codec, second_exchange):
    """Return a dialogue of two exchanges, whose answers are both predicted."""
    texts = ["is this film good ?", *second_exchange]
    turns = [Turn.of(role, text) for role, text in zip(("user", "assistant", "user"), texts, strict=False)]
    return DialogueEncoder(codec, ChatFormat(), max_tokens=64, learns_all=True).encode(turns, texts[-1])


@pytest.mark.methods("adept", "smop", "pt_moe", "idpg", "attempt", "late_state", "late_average", families=("llama",))
def test_the_prompt_of_a_dialogue_depends_on_its_first_user_turn_only(method, backbone):
    module = perturb(method.on(backbone))
    codec = backbone.codec
    batches = [
        codec.collate([encode_dialogue(codec, exchange)])
        for exchange in (["very good", "a dog ?", "dull"], ["is dull", "a story ?", "sad"])
    ]
    assert len(batches[0].encoded[0].answers) > len(codec.ids("very good")) + 1
    assert not torch.equal(batches[0].input_ids, batches[1].input_ids)
    with torch.no_grad():
        prompts = [prompt_tensors(module.lm().prompt(batch)) for batch in batches]
        shifts = [module.lm().prompt(batch).shift for batch in batches]
    assert_close(prompts[0], prompts[1])
    assert_close(shifts[0], shifts[1])


class Peeking(SoftPromptModule):
    """A soft token that is the mean of the row with its answer, which the contract forbids."""

    def build(self, backbone):
        self.scale = nn.Parameter(torch.ones(()))

    def prompt(self, batch):
        tokens = self.backbone.embed(batch.input_ids) * batch.mask[..., None]
        return SoftPrompt(tokens=self.scale * tokens.mean(1, keepdim=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_method_that_reads_answers_is_detected(backbone):
    module = Peeking(backbone=backbone.spec)
    module.attach(backbone)
    with pytest.raises(AssertionError):
        assert_prompt_ignores_answers(module, backbone.codec)


@pytest.mark.methods("prompt_tuning", "prefix_tuning", "dept", "idpg", "late_state")  # one per kind of prompt
def test_the_first_target_does_not_depend_on_the_answer(method, backbone):
    module = method.on(backbone)
    others = ("very long story", "good", "great", "is dull")  # of the same lengths as the targets
    batch, other = batch_of(backbone.codec), batch_of(backbone.codec, targets=others)
    with torch.no_grad():
        assert_close(module(batch)[:, 0], module(other)[:, 0], **CLOSE)


@pytest.fixture
def saved(method, backbone, classes, tmp_path):
    """A module and its checkpoint."""
    module = build_classifier(method, backbone, classes)
    batch, run = batch_of(backbone.codec, labels=LABELS), make_trainer()
    run.validate(module, loader_of(batch), verbose=False)
    run.save_checkpoint(tmp_path / "run.ckpt")
    return module, tmp_path / "run.ckpt"


@pytest.mark.methods(
    "prompt_tuning",
    "residual",  # a network
    "xprompt",  # tensors that are not trained
    "p_tuning_v2_head",  # a trained readout
    "mpt",  # parameters by task
    "late_state",
    families=("llama",),
)
def test_a_renamed_key_is_an_error(saved):
    module, path = saved
    checkpoint = load_checkpoint(path)
    name, value = checkpoint["state_dict"].popitem()
    checkpoint["state_dict"][f"{name}_before"] = value
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError, match=f'(?s)run.ckpt contains other tensors.*Missing key.*"{name}".*Unexpected key.*"{name}_before"'
    ):
        type(module).load_from_checkpoint(path)


@pytest.mark.methods("prompt_tuning")
def test_a_checkpoint_of_another_backbone_is_an_error(saved, method, family, load, classes):
    _, path = saved
    module = build_classifier(method, load(family, seed=1), classes)
    batch = batch_of(module.loaded.codec, labels=LABELS)
    with pytest.raises(ValueError, match="trained on"):
        make_trainer().validate(module, loader_of(batch), ckpt_path=path, verbose=False)


@torch.no_grad()
def test_generation_is_greedy_decoding_with_and_without_cache(method, family, backbone):
    module, codec = method.on(backbone), backbone.codec
    right, left = (batch_of(on_side(codec, side), TEMPLATES["middle"]) for side in ("right", "left"))
    if family in MASKED:
        for batch in (right, left):
            assert torch.equal(module.lm().generate(batch), module(batch).argmax(-1))
        return
    generate = partial(module.lm().generate, max_new_tokens=5)
    answers = list_answers(generate(right))
    for row, answer in zip(encode_rows(codec, TEMPLATES["middle"]), answers, strict=True):
        assert len(answer) == 5 or answer[-1] == EOS
        logits = module(codec.collate([codec.with_answer(row, answer)]))[0]
        assert logits.argmax(-1).tolist() == answer  # each token is the most likely one after those before it
    assert list_answers(generate(left)) == answers
    assert list_answers(generate(left, use_cache=False)) == answers


@pytest.mark.parametrize("family", MASKED)
def test_a_masked_model_refuses_decoding_options(backbone):
    with pytest.raises(ValueError, match="num_beams"):
        backbone.generate(batch_of(backbone.codec), num_beams=3)


def test_a_bfloat16_backbone_trains_a_float32_prompt(method, family, backbone, load_once, classes):
    torch.manual_seed(0)
    exact = perturb(build_classifier(method, backbone, classes), 0.1)
    torch.manual_seed(0)
    module = build_classifier(method, load_once(family, dtype="bfloat16"), classes)
    module.load_state_dict(exact.state_dict())
    batch = batch_of(backbone.codec, labels=LABELS)
    logits = module(batch)
    assert logits.dtype == torch.bfloat16
    loss, expected = (m.objective(m.lm(), batch).loss for m in (module, exact))
    loss.backward()
    assert_close(loss, expected, atol=0.1, rtol=0.05)
    for name, parameter in trainable_parameters(module).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def loss_gradients_and_calls(module, batch):
    """Returns the loss, the gradients by name, and the number of calls of the last attention."""
    *_, attention = (m for m in module.loaded.model.modules() if type(m).__name__.endswith("Attention"))
    module(batch)  # the trials of the first batch are not counted
    calls = []
    handle = attention.register_forward_hook(lambda *_: calls.append(1))
    loss = LanguageModeling()(module.lm(), batch).loss
    loss.backward()
    handle.remove()
    return loss.detach(), {name: p.grad for name, p in trainable_parameters(module).items()}, len(calls)


def test_gradient_checkpointing_changes_nothing(method, family, backbone, load_once):
    plain, checkpointed = method.on(backbone), method.on(load_once(family, checkpointing=True))
    checkpointed.load_state_dict(plain.state_dict())
    batch = batch_of(plain.loaded.codec)
    *expected, calls = loss_gradients_and_calls(plain, batch)
    *result, more_calls = loss_gradients_and_calls(checkpointed, batch)
    assert more_calls > calls
    assert_close(result, expected, **CLOSE)


@torch.no_grad()
def test_without_its_prompt_a_method_is_the_bare_backbone(method, backbone):
    batch = batch_of(backbone.codec)
    assert_close(method.on(backbone).lm()(batch, prompted=False), backbone(batch), **CLOSE)


@torch.no_grad()
def test_without_a_prompt_a_row_has_the_logits_of_transformers(family, backbone):
    bare = NoPrompt(backbone=backbone.spec)
    bare.attach(backbone)
    logits = bare(batch_of(backbone.codec))
    for b, row in enumerate(encode_rows(backbone.codec, TEMPLATES["front"])):
        ids = torch.tensor([row.ids])
        if family in SEQ2SEQ:
            expected = backbone.model(input_ids=ids, labels=torch.tensor([row.targets])).logits
        else:
            positions = torch.tensor(row.answers) - int(family not in MASKED)  # causal: at the token before
            expected = backbone.model(input_ids=ids).logits[:, positions]
        assert_close(logits[b : b + 1, : len(row.targets)], expected, **CLOSE)


def test_a_folded_prompt_gives_the_same_logits_or_is_refused(method, backbone, tmp_path):
    module = perturb(method.on(backbone))
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
    assert trainable_parameters(folded)


def test_training_without_parameters_is_refused(backbone):
    bare = NoPrompt(backbone=backbone.spec)
    bare.attach(backbone)
    assert not bare.trains
    with pytest.raises(ValueError, match="nothing to train"):
        bare.configure_optimizers()


def test_rows_have_targets_of_different_lengths():
    assert len({len(target.split()) for target in TARGETS}) > 1  # otherwise, no test covers padded targets
