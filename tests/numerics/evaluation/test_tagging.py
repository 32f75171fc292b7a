"""Tags: the head, its loss and the metrics against plain runs, loops and seqeval."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

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
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
METHODS = {
    "soft tokens": partial(PromptTuning, length=3),
    "keys and values": partial(PTuningV2, length=3),
    "both sides of a network": partial(PrefixTuning, length=2, width=8),
}


def spans(text):
    at = [0]
    for word in text.split():
        at.append(at[-1] + len(word) + 1)
    return tuple((a, b - 1) for a, b in pairwise(at))


def rows_of(codec, template="well :{soft} {text}{soft} . {target}", texts=TEXTS, most=None):
    written = Template(template, ["text"])
    return [codec.encode(written.pieces({"text": text}, {"text": spans(text)}), "", most) for text in texts]


def tags_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(len(NAMES), (len(row.words),), generator=generator).tolist()) for row in rows]


@pytest.fixture
def bare(backbone):
    """A backbone with a head and no prompt."""
    head = TokenHead(backbone.codec, TAGS)
    head.build(backbone)
    return PromptedLM(backbone, lambda _: SoftPrompt(), head), head.linear


def expected(family, backbone, linear, row):
    """Scores [W, C] of a row from transformers' own run of it alone."""
    stack = backbone.model.get_encoder() if family in SEQ2SEQ else backbone.model.base_model
    states = stack(torch.tensor([row.ids])).last_hidden_state[0]
    return torch.stack([linear.weight @ states[at] + linear.bias for at in row.words if at != NO_TOKEN])


def test_the_loss_is_that_of_each_tagged_word_alone(bare, backbone, family):
    lm, linear = bare
    rows = rows_of(backbone.codec, most=12)
    tags = tags_of(rows)
    batch = backbone.codec.collate(rows, labels=tags)
    losses, right, scores = [], 0, lm.scores(batch)
    for b, (row, labels) in enumerate(zip(rows, tags, strict=True)):
        alone = expected(family, backbone, linear, row)
        there = [w for w, at in enumerate(row.words) if at != NO_TOKEN]
        assert_close(scores[b, there], alone, **CLOSE)
        losses += [-alone[n].log_softmax(-1)[labels[w]] for n, w in enumerate(there)]
        right += sum(int(alone[n].argmax()) == labels[w] for n, w in enumerate(there))
    assert len(losses) < sum(map(len, tags))  # some were cut
    assert_close(Classification()(lm, batch).loss, torch.stack(losses).mean(), **CLOSE)
    assert accuracy(lm, batch) == pytest.approx(right / len(losses))
    evaluation = TaggingEvaluation(NAMES)
    evaluation.update(lm, batch)
    metrics = evaluation.compute()
    assert_close(metrics["cross_entropy"], torch.stack(losses).mean(), **CLOSE)
    assert float(metrics["accuracy"]) == pytest.approx(right / len(losses))


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_a_words_scores_depend_on_neither_padding_nor_batch(backbone, kind, side):
    module = METHODS[kind](backbone=backbone.spec, classes=TAGS, readout=TokenHead)
    module.attach(backbone)
    rows, codec = rows_of(backbone.codec), on_side(backbone.codec, side)
    alone = [module.lm().scores(codec.collate([row]))[0] for row in rows]
    batch = codec.collate(rows)
    padded = replace(
        more_padding(batch, 2, 3, codec.pad_id), words=torch.where(batch.words < 0, batch.words, batch.words + 2)
    )
    for together in (module.lm().scores(batch), module.lm().scores(padded)):
        for b, scores in enumerate(alone):
            assert_close(together[b, : len(scores)], scores, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone[0][0], alone[0][1], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_causal_word_is_read_off_before_what_follows(bare, backbone, family):
    lm, _ = bare
    one, other = (rows_of(backbone.codec, texts=[f"a dog {end}"]) for end in ("is sad", "ends well"))
    scores = [lm.scores(backbone.codec.collate(rows))[0] for rows in (one, other)]
    assert torch.allclose(scores[0][:2], scores[1][:2], atol=1e-5) == (family == "llama")


@pytest.mark.parametrize("kind", ["soft tokens", "keys and values"])
def test_prompt_and_head_have_gradients(load, kind):
    for family in ("llama", "bert", "t5"):
        backbone = load(family)
        module = METHODS[kind](backbone=backbone.spec, classes=TAGS, readout=TokenHead)
        module.attach(backbone)
        rows = rows_of(backbone.codec)
        module.step(backbone.codec.collate(rows, labels=tags_of(rows)))["loss"].backward()
        assert {"readout.linear.weight", "readout.linear.bias"} < dict(module.named_parameters()).keys()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("readout", [ClassHead, TokenHead])
def test_a_head_says_so_where_it_would_not_hear_the_prompt(backbone, readout):
    module = LatePromptTuning(
        backbone=backbone.spec, classes=TAGS, readout=readout, length=2, generator="free", layer=1
    )
    module.attach(backbone)
    with pytest.raises(ValueError, match="heads do not support soft tokens that enter at a middle layer"):
        module.lm().scores(backbone.codec.collate(rows_of(backbone.codec)))


@pytest.mark.parametrize("family", ["bert"])
def test_readouts_of_the_other_kind_are_refused(backbone):
    rows = rows_of(backbone.codec)
    for readout in (LabelWords, RankedChoices):
        with pytest.raises(
            ValueError, match=rf"{readout.__name__} requires label words.*set --model.readout to TokenHead"
        ):
            readout(backbone.codec, TAGS)
    head = ClassHead(backbone.codec, TAGS)
    head.build(backbone)
    with pytest.raises(ValueError, match=r"the readout scores .*set --model.readout to TokenHead"):
        PromptedLM(backbone, lambda _: SoftPrompt(), head).scores(backbone.codec.collate(rows))
    head = TokenHead(backbone.codec, TAGS)
    head.build(backbone)
    with pytest.raises(ValueError, match=r"TokenHead scores each word.*ClassHead"):
        PromptedLM(backbone, lambda _: SoftPrompt(), head).scores(
            backbone.codec.collate([r._replace(words=()) for r in rows])
        )


# Metrics


def sentences(count, names, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [[names[i] for i in torch.randint(len(names), (n,), generator=generator).tolist()] for n in lengths]


def of(names, said, true, lost=()):
    """The evaluation of what was said: each word's scores point at its tag."""
    evaluation = TaggingEvaluation(names)
    batch = padded(names, true, lost)
    wanted = padded(names, said).labels.clamp(min=0)
    lm = PromptedLM(None, lambda _: SoftPrompt(), lambda *_: torch.nn.functional.one_hot(wanted, len(names)).float())
    return evaluation, evaluation.update(lm, batch)


def padded(names, rows, lost=()):
    """A batch of as many tokens as words; those at the places in `lost` have none."""
    places = [[NO_TOKEN if (b, w) in lost else w for w in range(len(row))] for b, row in enumerate(rows)]
    words = pad_sequence([torch.tensor(row) for row in places], True, IGNORE)
    labels = pad_sequence([torch.tensor([names.index(tag) for tag in row]) for row in rows], True, IGNORE)
    real = words != IGNORE
    tensors = (real.long(), real, real, real.long(), real.long())  # nothing of them is read
    return Batch(*tensors, labels=labels.masked_fill(words < 0, IGNORE), words=words)


@pytest.mark.parametrize("names", [NAMES, (*NAMES, "B-MISC-X", "I-MISC-X"), ("O", "I-PER", "I-LOC"), ("B", "I", "O")])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:.*ill-defined")
def test_entities_score_as_in_seqeval(names, seed):
    true = sentences(60, names, seed)
    flips = torch.Generator().manual_seed(seed + 9)
    said = [[t if torch.rand((), generator=flips) < 0.7 else names[seed % len(names)] for t in row] for row in true]
    evaluation, records = of(names, said, true)
    assert [(r["prediction"], r["target"]) for r in records] == list(zip(said, true, strict=True))
    metrics = {name: float(value) for name, value in evaluation.compute().items()}
    assert 0 < metrics["f1"] < 1
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert metrics[name] == pytest.approx(score(true, said), abs=1e-6)
    types = entity_types(names)
    each = f1_score(true, said, average=None)
    assert [metrics[f"f1/{kind}"] for kind in types if kind] == pytest.approx(each[: sum(map(bool, types))], abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(
        sum(a == b for x, y in zip(said, true, strict=True) for a, b in zip(x, y, strict=True)) / sum(map(len, true))
    )


def test_counts_of_processes_add_up():
    true, said = sentences(40, NAMES, 0), sentences(40, NAMES, 0)[:20] + sentences(40, NAMES, 0)[20:][::-1]
    said = [[*row, *["O"] * len(other)][: len(other)] for row, other in zip(said, true, strict=True)]
    whole, _ = of(NAMES, said, true)
    parts = [of(NAMES, said[a:b], true[a:b])[0] for a, b in ((0, 7), (7, 40))]
    for name in ("accuracy", "loss", "entities"):
        getattr(parts[0], name).merge_state(getattr(parts[1], name))
    assert {k: float(v) for k, v in parts[0].compute().items()} == pytest.approx(
        {k: float(v) for k, v in whole.compute().items()}
    )
    whole.reset()
    assert not whole.entities.counts.any()


def test_words_without_a_token_are_left_out():
    true = [["B-PER", "I-PER", "O"], ["O", "B-LOC", "I-LOC"]]
    said = [["B-PER", "O", "O"], ["O", "B-LOC", "O"]]
    evaluation, records = of(NAMES, said, true, lost={(0, 1), (1, 2)})
    assert [r["prediction"] for r in records] == [["B-PER", None, "O"], ["O", "B-LOC", None]]
    assert [r["target"] for r in records] == [["B-PER", None, "O"], ["O", "B-LOC", None]]
    metrics = evaluation.compute()
    assert float(metrics["accuracy"]) == float(metrics["f1"]) == 1


def test_nothing_to_find_is_no_division_by_zero():
    evaluation, _ = of(NAMES, [["O", "O"]], [["O", "O"]])
    metrics = evaluation.compute()
    assert [float(metrics[name]) for name in ("precision", "recall", "f1", "f1/PER")] == [0] * 4


@pytest.mark.parametrize("names", [("NOUN", "VERB", "O"), ("O", "B-PER", "E-PER"), ("O", "other")])
def test_other_tags_are_scored_by_word_alone(names):
    evaluation, _ = of(names, [[names[0], names[1]]], [[names[0], names[2 % len(names)]]])
    assert evaluation.compute().keys() == {"accuracy", "cross_entropy"}
    assert evaluation.monitor == ("accuracy", "max")
    assert TaggingEvaluation(NAMES).monitor == ("f1", "max")


def test_rows_without_tags_are_predicted_and_not_scored():
    batch = replace(padded(NAMES, [["O", "O"], ["O"]]), labels=None)
    lm = PromptedLM(None, lambda _: SoftPrompt(), lambda *_: torch.eye(5)[torch.tensor([[1, 2], [3, 4]])])
    evaluation = TaggingEvaluation(NAMES)
    assert [r["prediction"] for r in evaluation.predict(lm, batch)] == [["B-PER", "I-PER"], ["B-LOC"]]
    with pytest.raises(ValueError, match="rows without tags cannot be scored"):
        evaluation.update(lm, batch)
    assert IGNORE in batch.words


def test_a_token_may_begin_two_words_and_a_word_may_have_none():
    assert words_starting_at([(0, 5), (5, 5), (6, 9)], [(0, 2), (3, 5), (5, 6), (7, 9)]) == [(0, 1), (), (3,)]
