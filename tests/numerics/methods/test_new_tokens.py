"""Rows of tokens: equal to PEFT's trainable tokens, and to a backbone with these rows in its tables."""

import pytest
import tiny
import torch
from lightning.pytorch import Trainer
from peft import TrainableTokensConfig, get_peft_model
from small_tokenizers import extend_by_words
from tiny import CLASSES, FAMILIES, TEMPLATES, batch_of, perturb
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_softprompt.backbones.insertion.token_rows import TokenSlots, replace_embeddings_of
from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.methods import Combined, LoRA, NewTokens, PrefixTuning, PromptTuning
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.objectives.language_modeling import LanguageModeling

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TOKENS = ["good", "film", "a"]
NEW = ["angioplasty", "cardiology"]
NEW_TEXTS = ("an angioplasty", "cardiology is good", "a film about cardiology", "dull")


def ids_of(codec, tokens=TOKENS):
    return [codec.ids(token)[0] for token in tokens]


def attach(backbone, **arguments):
    """Returns a method whose rows differ from those of the backbone."""
    module = NewTokens(**{"tokens": TOKENS, "update": "all", **arguments}, backbone=backbone.spec)
    module.attach(backbone, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return perturb(module, 0.3).eval()


def loss_of(module, batch):
    return LanguageModeling()(module.lm(), batch).loss


@pytest.fixture
def extended_folder(tmp_path):
    """Returns the folder of a tokenizer with new words, and the family's backbone extended by it."""

    def write(family):
        return extend_by_words(tiny.tokenizer(family), NEW, tmp_path / family)

    return write


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_rows_equal_those_in_the_tables_of_the_backbone(family, tied, load):
    module = attach(load(family), tied=tied)
    reference = load(family)
    ids = ids_of(reference.codec)
    head, table = reference.model.get_output_embeddings(), reference.model.get_input_embeddings()
    outputs = module.inputs if tied else module.outputs
    with torch.no_grad():
        head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[ids] = outputs
        table.weight[ids] = module.inputs
    for template in TEMPLATES.values():
        batch = batch_of(reference.codec, template)
        with torch.no_grad():
            assert_close(module(batch), reference(batch), **CLOSE)
            words = torch.tensor([*ids, 9, 10])
            assert_close(module.loaded(batch, words=words), reference(batch, words=words), **CLOSE)
            assert_close(module.loaded.cross_entropy(batch), reference.cross_entropy(batch), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_losses_and_gradients_equal_those_of_peft(family, load):
    reference = load(family)  # llama has separate tables, gpt2 and t5 have tied ones
    is_tied = family != "llama"
    backbone = load(family)
    ids = ids_of(backbone.codec)
    module = NewTokens(tokens=TOKENS, tied=is_tied, update="all", backbone=backbone.spec)
    module.attach(backbone)
    embedding, head = ("wte", "lm_head") if family == "gpt2" else ("shared", "lm_head")
    targets = [embedding] if is_tied else ["embed_tokens", "lm_head"]
    model = get_peft_model(reference.model, TrainableTokensConfig(token_indices=ids, target_modules=targets))
    rows = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(rows) == (1 if is_tied else 2)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1), torch.optim.AdamW(rows.values(), lr=0.1)]
    inputs = next(weight for name, weight in rows.items() if head not in name)
    batch = batch_of(backbone.codec)
    for _ in range(3):
        expected = peft_loss(model, batch, family)
        loss = LanguageModeling()(module.lm(), batch).loss
        expected.backward()
        loss.backward()
        assert_close(loss, expected, **CLOSE)
        assert_close(module.inputs.grad, inputs.grad, **CLOSE)
        if not is_tied:
            outputs = next(weight for name, weight in rows.items() if head in name)
            assert_close(module.outputs.grad, outputs.grad, **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def peft_loss(model, batch, family):
    """Returns the mean loss of the targets, one row at a time and without padding."""
    losses = []
    for row in batch.encoded:
        ids, targets = torch.tensor([row.ids]), torch.tensor([row.targets])
        if family == "t5":
            losses.append((model(input_ids=ids, labels=targets).loss, len(row.targets)))
            continue
        labels = torch.full_like(ids, IGNORE)
        labels[0, list(row.answers)] = targets
        losses.append((model(input_ids=ids, labels=labels).loss, len(row.targets)))
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_tokens_start_as_the_means_of_their_subwords(family, load, extended_folder):
    folder, base = extended_folder(family)
    backbone, plain = load(family, vocabulary=str(folder)), load(family)
    first = len(plain.codec.tokenizer)
    assert len(backbone.word_embeddings) >= first + len(NEW)
    expected = torch.stack([plain.word_embeddings[list(ids)].mean(0) for ids in base])
    assert_close(backbone.word_embeddings[first : first + len(NEW)], expected)
    module = NewTokens(backbone=backbone.spec)
    module.attach(backbone)
    assert_close(module.inputs, expected)
    assert module.ids.tolist() == [first, first + 1]
    batch = batch_of(plain.codec)
    old = len(plain.word_embeddings)
    with torch.no_grad():
        assert_close(module(batch)[..., :old], plain(batch), **CLOSE)
    assert backbone.fingerprint() != plain.fingerprint()


def test_a_prompt_of_the_plain_vocabulary_is_refused_by_the_extended_one(load, extended_folder):
    folder, _ = extended_folder("llama")
    difference = load("llama", vocabulary=str(folder)).fingerprint().split("-")
    assert difference[2] != load("llama").fingerprint().split("-")[2]  # the digest of the tokenizer


def test_another_base_tokenizer_is_refused(load, extended_folder):
    folder, _ = extended_folder("gpt2")
    with pytest.raises(ValueError, match=r"extends the tokenizer of 'base'.*another tokenizer"):
        load("llama", vocabulary=str(folder))


@pytest.mark.parametrize("tied", [False, True])
def test_only_occurring_rows_change(load, tied):
    backbone = load("llama")
    module = attach(backbone, tokens=["good", "dog", "never", "!"], tied=tied, update="occurring", lr=0.1)
    module.train()
    texts, targets = ("a good dog", "dull"), ("good", "bad")
    loader = DataLoader([batch_of(backbone.codec, texts=texts, targets=targets)] * 2, batch_size=None)
    other = DataLoader([batch_of(backbone.codec, texts=("never", "dull"), targets=("bad", "bad"))], batch_size=None)
    start = {name: rows.detach().clone() for name, rows in module.named_parameters()}
    fit(module, loader)
    assert_changed(module, start, [True, True, False, False])
    middle = {name: rows.detach().clone() for name, rows in module.named_parameters()}
    fit(module, other)
    assert_changed(module, middle, [False, False, True, False])


def fit(module, loader):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", max_epochs=3, enable_model_summary=False, **options).fit(module, loader)


def assert_changed(module, start, expected):
    for name, rows in trainable_parameters(module).items():
        changed = (rows != start[name]).any(1).tolist()
        assert changed == expected, name


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_rows_train_with_a_prompt_and_lora(family, load):
    parts = [PromptTuning(length=2), PrefixTuning(length=2, width=8), NewTokens(tokens=TOKENS), LoRA(rank=2)]
    backbone = load(family)
    module = Combined(parts=parts, backbone=backbone.spec)
    module.attach(backbone)
    module.train()
    perturb(module, 0.1)  # one of the matrices of LoRA starts at 0
    module.step(batch_of(backbone.codec))["loss"].backward()
    for name, parameter in trainable_parameters(module).items():
        assert parameter.grad.abs().sum() > 0, name


def test_two_methods_train_different_rows(load):
    both = load("llama")
    first, second = (NewTokens(tokens=[token], update="all", backbone=both.spec) for token in ("good", "film"))
    module = Combined(parts=[first, second], backbone=both.spec)
    module.attach(both)
    one = NewTokens(tokens=["good", "film"], update="all", backbone=both.spec)
    one.attach(load("llama"))
    batch = batch_of(both.codec)
    assert_close(loss_of(module.eval(), batch), loss_of(one.eval(), batch), **CLOSE)


def test_generated_answers_use_the_rows(load):
    backbone = load("llama")
    module = NewTokens(tokens=["good"], backbone=backbone.spec)
    module.attach(backbone)
    batch = batch_of(backbone.codec)
    [good] = ids_of(backbone.codec, ["good"])
    with torch.no_grad():
        states = backbone.states(batch).hidden.flatten(0, 1)
        module.outputs.copy_(100 * states.mean(0, keepdim=True))
    answers = backbone.generate(batch, max_new_tokens=3)
    logits = module(batch)
    assert (answers == good).any()
    assert logits[..., good].max() > 100


def test_classes_are_scored_with_the_rows(load):
    backbone = load("llama")
    module = attach(backbone, classes=CLASSES)
    batch = batch_of(backbone.codec, labels=(0, 1, 1, 0))
    module.step(batch)["loss"].backward()
    assert module.outputs.grad[0].abs().sum() > 0  # "good" is a label word
    assert module.outputs.grad[2].abs().sum() == 0  # "a" is not


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": None}, "requires tokens: set backbone.vocabulary"),
        ({"tokens": []}, "at least one token"),
        ({"tokens": ["good film"]}, "is not one token"),
        ({"tokens": [10**9]}, "no id 1000000000"),
        ({"tokens": ["good", "good"]}, "names a token twice"),
        ({"update": "some"}, "must be 'occurring' or 'all'"),
    ],
)
def test_bad_arguments_are_refused(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach(load("llama"), **arguments)


class ScaledEmbedding(torch.nn.Embedding):
    """An embedding module that multiplies its table by 3, as those of Gemma do by a constant."""

    def forward(self, ids):
        return 3 * super().forward(ids)


def test_rows_are_scaled_as_the_table_is():
    embedding = ScaledEmbedding(5, 2)
    model = torch.nn.ModuleDict({"embedding": embedding})
    model.get_input_embeddings = lambda: embedding
    ids = torch.tensor([[0, 3, 1]])
    expected = embedding(ids)
    rows = torch.tensor([[1.0, 2.0]])
    replace_embeddings_of(model, TokenSlots(torch.tensor([3]), 5), lambda: rows, 3.0)
    expected[0, 1] = 3 * rows[0]
    assert_close(embedding(ids), expected)
