"""Next-sentence and sentence-order prediction: the pairs, and the loss of transformers on them."""

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import BertForNextSentencePrediction

import lightning_softprompt as sp
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.data.corpus.pair_rows import NextSentence, SentenceOrder
from lightning_softprompt.readouts.class_head import ClassHead

DOCUMENTS = [
    "a warm film\nthe dog is sad\nit never ends",
    "dull\nvery dull indeed",
    "good story\nfunny dog\nthis was great\nbad dog",
    "a story that ends well",
]
SENTENCES = [document.split("\n") for document in DOCUMENTS]


@pytest.fixture
def data_of(tiny_folder):
    def make(**options):
        rows = [{"text": text} for text in DOCUMENTS]
        spec = sp.BackboneSpec(name=str(tiny_folder("bert")))
        common = {
            "train": rows,
            "validation": rows,
            "words": ("good", "bad"),
            "batch_size": 4,
            "cache": False,
            "window": 30,
        }
        return sp.SentencePairDataModule(backbone=spec, **{**common, **options})

    return make


def pairs_of(batch):
    return [(example.fields["first"], example.fields["second"], example.label) for example in batch.examples]


def test_the_loss_is_that_of_transformers(data_of, tiny_folder):
    """The head of BertForNextSentencePrediction gets the state of [CLS] in place of its pooled state."""
    data = data_of()
    backbone = load_backbone(data.spec)
    (batch,) = data.val_dataloader()
    head = ClassHead(backbone.codec, data.classes, "first")
    head.build(backbone)
    reference = BertForNextSentencePrediction.from_pretrained(tiny_folder("bert")).eval()
    with torch.no_grad():
        head.linear.weight.copy_(reference.cls.seq_relationship.weight)
        head.linear.bias.copy_(reference.cls.seq_relationship.bias)
    losses, losses_of_one_type = [], []
    for row, label in zip(backbone.codec.without_answers(batch).encoded, batch.labels, strict=True):
        ids = torch.tensor([row.ids])
        end_of_first = row.ids.index(tiny.EOS)
        types = torch.tensor([[int(position > end_of_first) for position in range(len(row.ids))]])
        for losses_of, token_types in ((losses, types), (losses_of_one_type, 0 * types)):
            with torch.no_grad():
                states = reference.bert(input_ids=ids, token_type_ids=token_types).last_hidden_state
                losses_of.append(cross_entropy(reference.cls.seq_relationship(states[:, 0]), label[None]))
    with torch.no_grad():
        loss = cross_entropy(head(PromptedLM(backbone, lambda _: SoftPrompt(), head), batch), batch.labels)
    assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    assert abs(loss - torch.stack(losses_of_one_type).mean()) > 1e-3


def test_soft_tokens_and_padding_do_not_change_the_types(data_of):
    data = data_of(template="{soft}{first}{separator}{soft}{second}{target}")
    module = sp.PromptTuning(length=4, data=data)
    module.configure_model()
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        rows = module.loaded(batch, module.prompt(batch))
        for number in range(len(batch)):
            row = module.loaded.codec.collate([batch.encoded[number]])
            assert_close(module.loaded(row, module.prompt(row)), rows[number : number + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pairs", [NextSentence(), SentenceOrder()])
def test_pairs_are_drawn_again_in_each_epoch(data_of, pairs):
    data = data_of(pairs=pairs)
    loader, same = data.train_dataloader(), data_of(pairs=pairs).train_dataloader()
    epochs = []
    for epoch in range(12):
        for each in (loader, same):
            each.batch_sampler.set_epoch(epoch)
        epochs.append(sorted(pair for batch in loader for pair in pairs_of(batch)))
        assert epochs[-1] == sorted(pair for batch in same for pair in pairs_of(batch))
    assert len({str(epoch) for epoch in epochs}) > 6
    drawn = [pair for epoch in epochs for pair in epoch]
    assert 0.25 < sum(label for _, _, label in drawn) / len(drawn) < 0.75
    for first, second, label in drawn:
        is_consecutive = any(f"{first} {second}" in " ".join(document) for document in SENTENCES)
        is_swapped = any(f"{second} {first}" in " ".join(document) for document in SENTENCES)
        assert is_consecutive == (label == 0)
        if label == 1:
            assert is_swapped == isinstance(pairs, SentenceOrder)
    assert [pairs_of(batch) for batch in data.val_dataloader()] == [pairs_of(batch) for batch in data.val_dataloader()]


def test_documents_that_have_no_pairs_are_refused(data_of):
    with pytest.raises(ValueError, match="none of its 1 documents has two sentences"):
        data_of(train=[{"text": "one"}]).split("train")
    with pytest.raises(ValueError, match=r"at least 2 documents .* use SentenceOrder"):
        data_of(validation=[{"text": "one\ntwo"}]).split("validation")
