"""Language modeling by encoders and encoder-decoders: the losses of transformers' models on the same rows."""

import json

import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

import lightning_softprompt as sp
from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.data.corpus.corruption import CorruptSpans, MaskTokens, SplitPrefix

TEXTS = [
    "a warm and funny film about a dog that never ends well",
    "dull",
    "it is a sad story about a dog . this film is very good indeed",
    "this story never was good was it",
]
FAMILIES = ("t5", "bart", "bert")


@pytest.fixture(scope="module")
def folder_of(tiny_folder, tmp_path_factory):
    """A function from a family to a tiny backbone, whose tokenizer has sentinels if the family is T5."""

    def make(family):
        if family != "t5":
            return tiny_folder(family)
        folder = tiny.save("t5", tmp_path_factory.mktemp("t5"))
        rules = json.loads((folder / "tokenizer.json").read_text())
        names = dict(zip((",", "!", "?", ":"), (f"<extra_id_{n}>" for n in range(4)), strict=True))
        vocabulary = rules["model"]["vocab"]
        rules["model"]["vocab"] = {names.get(word, word): id for word, id in vocabulary.items()}
        (folder / "tokenizer.json").write_text(json.dumps(rules))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
        assert len(tokenizer) == tiny.V
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def data_of(folder_of):
    def make(family, **options):
        rows = [{"text": text} for text in TEXTS]
        spec = sp.BackboneSpec(name=str(folder_of(family)))
        return sp.CorpusDataModule(
            backbone=spec, train=rows, validation=rows, test=rows, **{"window": 40, "batch_size": 3, **options}
        )

    return make


def expected_loss(backbone, row):
    """Returns the sum of the losses of a row by transformers."""
    ids = torch.tensor([row.ids])
    labels = torch.tensor([row.targets])
    if row.answers:
        labels = torch.full_like(ids, IGNORE)
        labels[0, list(row.answers)] = torch.tensor(row.targets)
    with torch.no_grad():
        return float(backbone.model(input_ids=ids, labels=labels).loss) * len(row.targets)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("corruption", [None, MaskTokens(0.4, whole_words=True), CorruptSpans(0.4), SplitPrefix()])
def test_the_loss_is_that_of_transformers(family, corruption, data_of):
    if corruption is not None and (family == "bert") != isinstance(corruption, MaskTokens):
        pytest.skip("the family does not support the corruption")
    data = data_of(family, corruption=corruption)
    module = sp.NoPrompt(data=data)
    module.configure_model()
    count = 0
    for batch in data.build_loader("test", "longest_first"):
        with torch.no_grad():
            losses = module.lm().cross_entropy(batch).sum(1)
        for loss, row in zip(losses.tolist(), batch.encoded, strict=True):
            assert loss == pytest.approx(expected_loss(module.loaded, row), abs=1e-4, rel=1e-5)
            count += 1
    assert count == len(data.split("test"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_documents_equals_each_document_alone(family, data_of):
    data = data_of(family, batch_size=100)
    module = sp.PromptTuning(length=3, data=data)
    module.configure_model()
    (batch,) = data.build_loader("test", "longest_first")
    together = module.lm().cross_entropy(batch)
    together.sum().backward()
    parameter = next(parameter for parameter in module.parameters() if parameter.grad is not None)
    gradient = parameter.grad.clone()
    parameter.grad = None
    for b, row in enumerate(batch.encoded):
        alone = module.lm().cross_entropy(data.codec.collate([row]))
        assert torch.allclose(together[b, : alone.shape[1]], alone[0], atol=1e-5)
        assert not together[b, alone.shape[1] :].any()
        alone.sum().backward()
    assert torch.allclose(gradient, parameter.grad, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_tokens_are_selected_in_each_epoch_but_not_in_validation(family, data_of):
    data = data_of(family)

    def rows(name, order, epoch):
        loader = data.build_loader(name, order)
        loader.batch_sampler.set_epoch(epoch)
        return {row: encoded for batch in loader for row, encoded in zip(batch.row_ids, batch.encoded, strict=True)}

    assert rows("train", "shuffled", 0) == rows("train", "shuffled", 0) != rows("train", "shuffled", 1)
    assert rows("validation", "longest_first", 0) == rows("validation", "longest_first", 1)
    assert rows("validation", "longest_first", 0) == {**rows("test", "longest_first", 0)}


def test_only_losses_per_token_are_logged(data_of):
    module = sp.PromptTuning(length=2, data=data_of("bert"))
    evaluation = data_of("bert").evaluation
    assert evaluation.monitor == ("cross_entropy", "min")
    module.configure_model()
    evaluation.begin("test", 0)
    for batch in data_of("bert").build_loader("test", "longest_first"):
        with torch.no_grad():
            records = evaluation.update(module.lm(), batch)
        assert all(record["prediction"].endswith("nats per token") for record in records)
    assert set(evaluation.compute()) == {
        "cross_entropy", "perplexity", "cross_entropy_low", "cross_entropy_high", "documents", "tokens",
    }  # fmt: skip


def test_families_refuse_other_corruptions(tiny_folder, data_of):
    with pytest.raises(ValueError, match="CorruptSpans, which is for encoder-decoders; this backbone uses MaskTokens"):
        _ = data_of("bert", corruption=CorruptSpans()).evaluation
    rows = [{"text": text} for text in TEXTS]
    spec = sp.BackboneSpec(name=str(tiny_folder("llama")))
    with pytest.raises(ValueError, match="MaskTokens, which is for encoders; this backbone predicts every token"):
        _ = sp.CorpusDataModule(backbone=spec, train=rows, validation=rows, corruption=MaskTokens()).evaluation
    spec = sp.BackboneSpec(name=str(tiny_folder("t5")))
    with pytest.raises(ValueError, match="requires a tokenizer with sentinels"):
        _ = sp.CorpusDataModule(backbone=spec, train=rows, validation=rows).evaluation


def test_a_task_of_several_cannot_have_corrupted_rows(data_of):
    with pytest.raises(ValueError, match=r"the tasks \['one', 'two'\] do"):
        sp.MultitaskDataModule({"one": data_of("bert"), "two": data_of("bert")}).split("train")


def test_a_scattered_answer_cannot_be_replaced(data_of):
    data = data_of("bert", corruption=MaskTokens(0.5), window=1000)
    (batch, *_) = data.build_loader("test", "longest_first")
    with pytest.raises(ValueError, match="scattered"):
        data.codec.without_answers(batch)
