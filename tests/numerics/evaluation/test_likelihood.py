"""The likelihood of windows: equal to that of each window alone, and to transformers' loss."""

import math

import pytest
import tiny
import torch

import lightning_softprompt as sp
from lightning_softprompt.core.types import WindowExample
from lightning_softprompt.evaluation.likelihood import LikelihoodEvaluation
from lightning_softprompt.evaluation.metrics.intervals import bootstrap_ratio

TEXTS = [
    "a warm and funny film about a dog that never ends well",
    "dull",
    "it is a sad story about a dog . this film is very good indeed !",
    "this story never was good , was it ?",
]


@pytest.fixture
def data_of(tiny_folder):
    def make(family, **options):
        spec = sp.BackboneSpec(name=str(tiny_folder(family)))
        rows = [{"text": text} for text in TEXTS]
        return sp.CorpusDataModule(backbone=spec, train=rows, validation=rows, test=rows, window=24, **options)

    return make


def batches(data, size, order=None):
    rows = data.split("test")
    numbers = list(range(len(rows))) if order is None else order
    return [data.collate([rows[i] for i in numbers[a : a + size]]) for a in range(0, len(numbers), size)]


def score(lm, data, size, order=None):
    evaluation = LikelihoodEvaluation()
    evaluation.begin("test", 0)
    with torch.no_grad():
        for batch in batches(data, size, order):
            evaluation.update(lm, batch)
    return {name: float(value) for name, value in evaluation.compute().items()}


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_packed_documents_equal_each_document_alone(family, load, data_of):
    data = data_of(family)
    module = sp.PromptTuning(length=3, data=data)
    module.attach(load(family))
    rows = data.split("test")
    (batch,) = batches(data, len(rows))
    packed = module.lm().cross_entropy(batch)
    packed.sum().backward()
    gradient = module.loaded and next(p for p in module.parameters() if p.grad is not None).grad.clone()
    module.zero_grad()
    for i in range(len(rows)):
        alone = module.lm().cross_entropy(data.collate([rows[i]]))
        assert torch.allclose(packed[i, : alone.shape[1]], alone[0], atol=1e-5)
        alone.sum().backward()
    summed = next(p for p in module.parameters() if p.grad is not None).grad
    assert torch.allclose(gradient, summed, atol=1e-5 * float(summed.abs().max()) + 1e-6)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_the_loss_is_that_of_transformers(family, load, data_of):
    data, backbone = data_of(family), load(family)
    module = sp.NoPrompt(data=data)
    module.attach(backbone)
    total = 0.0
    for row in data.split("test").encoded:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            total += float(backbone.model(ids, labels=ids).loss) * (len(row.ids) - 1)
    metrics = score(module.lm(), data, 3)
    num_tokens = sum(len(row.targets) for row in data.split("test").encoded)
    assert metrics["cross_entropy"] == pytest.approx(total / num_tokens, abs=1e-5)
    num_bytes, num_words = sum(map(len, TEXTS)), sum(len(text.split()) for text in TEXTS)
    assert metrics["bits_per_byte"] == pytest.approx(total / num_bytes / math.log(2), rel=1e-5)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(total / num_bytes), rel=1e-5)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(total / num_words), rel=1e-5)
    assert metrics["tokens_per_word"] == pytest.approx(num_tokens / num_words)


def test_metrics_do_not_depend_on_batches_or_order(load, data_of):
    module = sp.PromptTuning(length=3, data=data_of("llama"))
    module.attach(load("llama"))
    data = data_of("llama")
    order = list(range(len(data.split("test"))))[::-1]
    one, other = score(module.lm(), data, 1), score(module.lm(), data, 5, order)
    assert one == pytest.approx(other, rel=1e-6)


def test_with_a_stride_each_token_is_scored_once_after_a_context(load, data_of):
    data = data_of("llama", stride=16)
    module = sp.NoPrompt(data=data)
    module.attach(load("llama"))
    codec, rows = data.codec, data.split("test")
    by_document = {}
    for window in rows.examples:
        by_document.setdefault(window.document, []).append(window)
    assert ["".join(window.target for window in windows) for windows in by_document.values()] == TEXTS
    total, num_tokens = 0.0, 0
    for text, windows in zip(TEXTS, by_document.values(), strict=True):
        position = 0
        for window in windows:
            context = window.fields["context"]
            assert text[:position].endswith(context)
            assert len(context) <= 8
            if position > 8 and context and not context.startswith(" "):  # no word begins in the longest context
                longest_context = text[position - 8 : position]
                assert " " not in longest_context
            assert len(window.target) <= 16
            before, ids = [*codec.start, *codec.ids(context)], codec.ids(window.target)
            with torch.no_grad():
                scores = module.loaded.model(torch.tensor([[*before, *ids]])).logits[0].log_softmax(-1)
            first = len(before) - 1  # the logits at the last token before the text predict its first token
            positions = range(first, first + len(ids))
            total -= float(scores[positions, ids].sum())
            num_tokens += len(ids)
            position += len(window.target)
    assert num_tokens == sum(len(codec.ids(text)) for text in TEXTS)
    metrics = score(module.lm(), data, 3)
    assert metrics["cross_entropy"] == pytest.approx(total / num_tokens, rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(total / sum(map(len, TEXTS)) / math.log(2), rel=1e-5)
    train = data.split("train").examples
    assert {window.fields["context"] for window in train} == {""}
    assert [window.target for window in train] == [window.target for window in data_of("llama").split("train").examples]


class FixedLosses:
    """Predicts windows with given nats per token."""

    def __init__(self, losses):
        self.losses = losses

    def cross_entropy(self, batch):
        return self.losses


def test_the_interval_resamples_documents(load, data_of):
    codec = data_of("llama").codec
    examples = [WindowExample({}, "a b", document=i // 2, num_bytes=3, num_words=2) for i in range(6)]
    rows = [codec.encode(sp.Template("{target}").pieces({}), "a dog") for _ in examples]
    batch = codec.collate(rows, examples=examples)
    losses = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0], [2.0, 2.0], [4.0, 4.0], [4.0, 4.0]])
    evaluation = LikelihoodEvaluation()
    evaluation.begin("test", 0)
    evaluation.update(FixedLosses(losses), batch)
    metrics = evaluation.compute()
    expected = bootstrap_ratio([4 / math.log(2), 8 / math.log(2), 16 / math.log(2)], [6, 6, 6])
    interval = (float(metrics["bits_per_byte_low"]), float(metrics["bits_per_byte_high"]))
    assert interval == pytest.approx(expected)
    assert float(metrics["documents"]) == 3
    assert float(metrics["cross_entropy"]) == pytest.approx(28 / 12)


def test_the_interval_covers_the_ratio():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        sizes = torch.randint(50, 500, (60,), generator=generator).double()
        nats = sizes * (1.5 + 0.3 * torch.randn(60, generator=generator).double())
        low, high = bootstrap_ratio(nats.tolist(), sizes.tolist(), draws=300, seed=seed)
        covered += low <= 1.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_objective_and_evaluation_share_one_forward_pass(load, data_of, monkeypatch):
    data = data_of("llama")
    module = sp.PromptTuning(length=3, data=data)
    module.attach(load("llama"))
    passes = []
    run = module.loaded.states
    monkeypatch.setattr(module.loaded, "states", lambda *args: passes.append(1) or run(*args))
    first, second = batches(data, 3)[:2]
    with torch.no_grad():
        module.score("test", first)
        assert len(passes) == 1
        module.score("test", second)
        assert len(passes) == 2
        lm = module.lm()
        prompted, bare = lm.cross_entropy(first), lm.cross_entropy(first, prompted=False)
        assert not torch.equal(prompted, bare)
        assert torch.equal(lm.cross_entropy(first), prompted)
    assert lm.cross_entropy(first).requires_grad
    assert len(passes) == 6
