"""Tags: the head, its loss and the metrics compared with plain runs, loops and seqeval."""

from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from tiny import SEQ2SEQ, TEXTS, more_padding, on_side
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.word_alignment import words_starting_at
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import IGNORE, NO_TOKEN, Batch, Classes, SoftPrompt
from lightning_softprompt.evaluation.tagging import TaggingEvaluation, entity_types
from lightning_softprompt.methods import LatePromptTuning, PrefixTuning, PromptTuning, PTuningV2
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.objectives.penalties import accuracy
from lightning_softprompt.readouts.class_head import ClassHead
from lightning_softprompt.readouts.label_words import LabelWords
from lightning_softprompt.readouts.ranked import RankedChoices
from lightning_softprompt.readouts.token_head import TokenHead

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TAGS = Classes(dict.fromkeys(NAMES, ()))
BACKBONE = SimpleNamespace(prompt_view=lambda batch: batch)  # no model: scores are fixed
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
METHODS = {
    "soft tokens": partial(PromptTuning, length=3),
    "keys and values": partial(PTuningV2, length=3),
    "both sides of a network": partial(PrefixTuning, length=2, width=8),
}


def word_spans(text):
    starts = [0]
    for word in text.split():
        starts.append(starts[-1] + len(word) + 1)
    return tuple((start, following - 1) for start, following in pairwise(starts))


def encode_rows(codec, template="well :{soft} {text}{soft} . {target}", texts=TEXTS, max_tokens=None):
    template = Template(template, ["text"])
    rows = [template.pieces({"text": text}, {"text": word_spans(text)}) for text in texts]
    return [codec.encode(pieces, "", max_tokens) for pieces in rows]


def random_tags(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tags = []
    for row in rows:
        classes = torch.randint(len(NAMES), (len(row.words),), generator=generator)
        tags.append(tuple(classes.tolist()))
    return tags


@pytest.fixture
def head(backbone):
    """The head of a backbone."""
    head = TokenHead(backbone.codec, TAGS)
    head.build(backbone)
    return head


@pytest.fixture
def lm(backbone, head):
    """A backbone with a head and no prompt."""
    return PromptedLM(backbone, lambda _: SoftPrompt(), head)


def scores_alone(family, backbone, linear, row):
    """Returns the scores [W, C] of a row on its own, from the states that transformers computes."""
    stack = backbone.model.get_encoder() if family in SEQ2SEQ else backbone.model.base_model
    states = stack(torch.tensor([row.ids])).last_hidden_state[0]
    columns = [column for column in row.words if column != NO_TOKEN]
    return torch.stack([linear.weight @ states[column] + linear.bias for column in columns])


def test_the_loss_is_the_mean_over_the_tagged_words_of_all_rows(lm, head, backbone, family):
    rows = encode_rows(backbone.codec, max_tokens=12)
    tags = random_tags(rows)
    batch = backbone.codec.collate(rows, labels=tags)
    losses, num_correct, scores = [], 0, lm.scores(batch)
    for b, (row, labels) in enumerate(zip(rows, tags, strict=True)):
        alone = scores_alone(family, backbone, head.linear, row)
        words = [w for w, column in enumerate(row.words) if column != NO_TOKEN]
        assert_close(scores[b, words], alone, **CLOSE)
        for word, word_scores in zip(words, alone, strict=True):
            losses.append(-word_scores.log_softmax(-1)[labels[word]])
            num_correct += int(word_scores.argmax()) == labels[word]
    assert len(losses) < sum(map(len, tags))  # some words were truncated
    assert_close(Classification()(lm, batch).loss, torch.stack(losses).mean(), **CLOSE)
    assert accuracy(lm, batch) == pytest.approx(num_correct / len(losses))
    evaluation = TaggingEvaluation(NAMES)
    evaluation.update(lm, batch)
    metrics = evaluation.compute()
    assert_close(metrics["cross_entropy"], torch.stack(losses).mean(), **CLOSE)
    assert float(metrics["accuracy"]) == pytest.approx(num_correct / len(losses))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_the_scores_of_a_word_do_not_depend_on_padding_or_other_rows(backbone, kind, side):
    module = METHODS[kind](backbone=backbone.spec, classes=TAGS, readout=TokenHead)
    module.attach(backbone)
    rows, codec = encode_rows(backbone.codec), on_side(backbone.codec, side)
    alone = [module.lm().scores(codec.collate([row]))[0] for row in rows]
    batch = codec.collate(rows)
    shifted_words = torch.where(batch.words < 0, batch.words, batch.words + 2)
    padded = replace(more_padding(batch, 2, 3, codec.pad_id), words=shifted_words)
    for batch_scores in (module.lm().scores(batch), module.lm().scores(padded)):
        for b, scores in enumerate(alone):
            assert_close(batch_scores[b, : len(scores)], scores, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone[0][0], alone[0][1], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_scores_of_a_word_in_a_decoder_do_not_depend_on_later_words(lm, backbone, family):
    def score_words(text):
        return lm.scores(backbone.codec.collate(encode_rows(backbone.codec, texts=[text])))[0]

    first, second = score_words("a dog is sad"), score_words("a dog ends well")
    assert torch.allclose(first[:2], second[:2], atol=1e-5) == (family == "llama")


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("kind", ["soft tokens", "keys and values"])
def test_prompt_and_head_have_gradients(backbone, kind):
    module = METHODS[kind](backbone=backbone.spec, classes=TAGS, readout=TokenHead)
    module.attach(backbone)
    rows = encode_rows(backbone.codec)
    module.step(backbone.codec.collate(rows, labels=random_tags(rows)))["loss"].backward()
    assert {"readout.linear.weight", "readout.linear.bias"} < dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("readout", [ClassHead, TokenHead])
def test_heads_reject_soft_tokens_at_a_middle_layer(backbone, readout):
    prompt = {"length": 2, "generator": "free", "layer": 1}
    module = LatePromptTuning(backbone=backbone.spec, classes=TAGS, readout=readout, **prompt)
    module.attach(backbone)
    with pytest.raises(ValueError, match="heads do not support soft tokens that enter at a middle layer"):
        module.lm().scores(backbone.codec.collate(encode_rows(backbone.codec)))


@pytest.mark.parametrize("family", ["bert"])
@pytest.mark.parametrize("readout", [LabelWords, RankedChoices])
def test_readouts_of_label_words_reject_tags(backbone, readout):
    message = rf"{readout.__name__} requires label words.*set --model.readout to TokenHead"
    with pytest.raises(ValueError, match=message):
        readout(backbone.codec, TAGS)


@pytest.mark.parametrize("family", ["bert"])
def test_a_class_head_rejects_rows_with_words_and_a_token_head_rows_without(backbone, lm):
    rows = encode_rows(backbone.codec)
    class_head = ClassHead(backbone.codec, TAGS)
    class_head.build(backbone)
    with pytest.raises(ValueError, match=r"the readout scores .*set --model.readout to TokenHead"):
        PromptedLM(backbone, lambda _: SoftPrompt(), class_head).scores(backbone.codec.collate(rows))
    without_words = backbone.codec.collate([row._replace(words=()) for row in rows])
    with pytest.raises(ValueError, match=r"TokenHead scores each word.*ClassHead"):
        lm.scores(without_words)


# Metrics


def random_sentences(count, names, seed):
    """Returns the random tags of sentences."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    classes = [torch.randint(len(names), (length,), generator=generator).tolist() for length in lengths]
    return [[names[c] for c in sentence] for sentence in classes]


def evaluate(names, predictions, targets, lost=()):
    """Returns the evaluation of predicted tags and its records."""
    evaluation = TaggingEvaluation(names)
    batch = make_batch(names, targets, lost)
    classes = make_batch(names, predictions).labels.clamp(min=0)
    scores = torch.nn.functional.one_hot(classes, len(names)).float()
    lm = PromptedLM(BACKBONE, lambda _: SoftPrompt(), lambda *_: scores)
    return evaluation, evaluation.update(lm, batch)


def make_batch(names, rows, lost=()):
    """Returns a batch with one token for each word, except for the pairs of row and word in `lost`."""
    columns, labels = [], []
    for b, row in enumerate(rows):
        row_columns = [NO_TOKEN if (b, w) in lost else w for w in range(len(row))]
        columns.append(torch.tensor(row_columns))
        labels.append(torch.tensor([names.index(tag) for tag in row]))
    words, labels = pad_sequence(columns, True, IGNORE), pad_sequence(labels, True, IGNORE)
    real = words != IGNORE
    tensors = (real.long(), real, real, real.long(), real.long())  # not used
    return Batch(*tensors, labels=labels.masked_fill(words < 0, IGNORE), words=words)


@pytest.mark.parametrize("names", [NAMES, (*NAMES, "B-MISC-X", "I-MISC-X"), ("O", "I-PER", "I-LOC"), ("B", "I", "O")])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:.*ill-defined")
def test_scores_of_entities_equal_seqeval(names, seed):
    targets = random_sentences(60, names, seed)
    generator, other = torch.Generator().manual_seed(seed + 9), names[seed % len(names)]
    predictions = []
    for row in targets:
        is_unchanged = (torch.rand(len(row), generator=generator) < 0.7).tolist()
        predictions.append([tag if unchanged else other for tag, unchanged in zip(row, is_unchanged, strict=True)])
    evaluation, records = evaluate(names, predictions, targets)
    assert [record["prediction"] for record in records] == predictions
    assert [record["target"] for record in records] == targets
    metrics = {name: float(value) for name, value in evaluation.compute().items()}
    assert 0 < metrics["f1"] < 1
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert metrics[name] == pytest.approx(score(targets, predictions), abs=1e-6)
    types = [kind for kind in entity_types(names) if kind]
    by_type = f1_score(targets, predictions, average=None)
    assert [metrics[f"f1/{kind}"] for kind in types] == pytest.approx(by_type[: len(types)], abs=1e-6)
    pairs = zip(chain(*predictions), chain(*targets), strict=True)
    assert metrics["accuracy"] == pytest.approx(fmean(a == b for a, b in pairs))


def test_metrics_of_merged_states_equal_those_of_all_rows():
    targets = random_sentences(40, NAMES, 0)
    predictions = targets[:20] + targets[20:][::-1]
    for b, target in enumerate(targets):
        padded = [*predictions[b], *["O"] * len(target)]
        predictions[b] = padded[: len(target)]
    evaluation, _ = evaluate(NAMES, predictions, targets)
    first, _ = evaluate(NAMES, predictions[:7], targets[:7])
    second, _ = evaluate(NAMES, predictions[7:], targets[7:])
    for name in ("accuracy", "loss", "entities"):
        getattr(first, name).merge_state(getattr(second, name))
    expected = evaluation.compute()
    merged = first.compute()
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(merged[name], value)
    evaluation.reset()
    assert not evaluation.entities.counts.any()


def test_words_without_a_token_are_not_scored():
    targets = [["B-PER", "I-PER", "O"], ["O", "B-LOC", "I-LOC"]]
    predictions = [["B-PER", "O", "O"], ["O", "B-LOC", "O"]]
    evaluation, records = evaluate(NAMES, predictions, targets, lost={(0, 1), (1, 2)})
    scored = [["B-PER", None, "O"], ["O", "B-LOC", None]]
    assert [record["prediction"] for record in records] == scored
    assert [record["target"] for record in records] == scored
    metrics = evaluation.compute()
    assert float(metrics["accuracy"]) == float(metrics["f1"]) == 1


def test_rows_without_entities_cause_no_division_by_zero():
    evaluation, _ = evaluate(NAMES, [["O", "O"]], [["O", "O"]])
    metrics = evaluation.compute()
    assert [float(metrics[name]) for name in ("precision", "recall", "f1", "f1/PER")] == [0] * 4


@pytest.mark.parametrize("names", [("NOUN", "VERB", "O"), ("O", "B-PER", "E-PER"), ("O", "other")])
def test_other_tags_are_scored_by_word_only(names):
    predictions, targets = [names[0], names[1]], [names[0], names[-1]]
    evaluation, _ = evaluate(names, [predictions], [targets])
    assert evaluation.compute().keys() == {"accuracy", "cross_entropy"}
    assert evaluation.monitor == ("accuracy", "max")
    assert TaggingEvaluation(NAMES).monitor == ("f1", "max")


def test_rows_without_tags_can_be_predicted_but_not_scored():
    batch = replace(make_batch(NAMES, [["O", "O"], ["O"]]), labels=None)
    scores = torch.eye(5)[torch.tensor([[1, 2], [3, 4]])]
    lm = PromptedLM(BACKBONE, lambda _: SoftPrompt(), lambda *_: scores)
    evaluation = TaggingEvaluation(NAMES)
    assert [record["prediction"] for record in evaluation.predict(lm, batch)] == [["B-PER", "I-PER"], ["B-LOC"]]
    with pytest.raises(ValueError, match="rows without tags cannot be scored"):
        evaluation.update(lm, batch)
    assert IGNORE in batch.words


def test_a_token_can_start_two_words_and_a_word_can_have_no_token():
    tokens = [(0, 5), (5, 5), (6, 9)]
    words = [(0, 2), (3, 5), (5, 6), (7, 9)]
    assert words_starting_at(tokens, words) == [(0, 1), (), (3,)]
