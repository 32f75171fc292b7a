"""What must be equal, whatever the weights: soft tokens and words, batches and loops, metrics and their reference."""

from dataclasses import replace

import pytest
import torch
from sklearn import metrics
from tiny import CLASSES, MASKED, TARGETS, TEMPLATES, TEXTS, V, batch_of, encode_rows, on_side, real
from torch.testing import assert_close

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Classes, SoftPrompt
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.readouts.calibrated import Calibrated
from lightning_softprompt.readouts.label_words import LabelWords
from lightning_softprompt.readouts.ranked import RankedChoices

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIDES = ("right", "left")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def embed_text(backbone, text):
    return backbone.embed(torch.tensor([backbone.codec.ids(text)]))


@pytest.fixture
def prompted(backbone):
    """A language model with a prompt of four random tokens."""
    tokens = torch.randn(1, 4, backbone.hidden_size)
    return lambda readout=None: PromptedLM(backbone, lambda batch: SoftPrompt(tokens=tokens), readout)


# Soft tokens and words


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("soft", "hard"),
    [
        ("{soft}{text} it was {target}", "it is a {text} it was {target}"),
        ("{text}{soft} it was {target}", "{text} it is a it was {target}"),
        ("{text} it was{soft} {target}", "{text} it was it is a {target}"),
    ],
    ids=["front", "middle", "end"],
)
def test_a_soft_prompt_of_word_embeddings_acts_like_the_words(backbone, soft, hard, side):
    codec = on_side(backbone.codec, side)
    with_slots, words = batch_of(codec, soft), batch_of(codec, hard)
    prompt = SoftPrompt(tokens=embed_text(backbone, "it is a"))
    assert_close(real(with_slots, backbone(with_slots, prompt)), real(words, backbone(words)), **CLOSE)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_soft_words_after_the_answer_act_like_words_in_bidirectional_attention(backbone, side):
    codec = on_side(backbone.codec, side)
    soft = batch_of(codec, "{text} it was {target}{soft} .")
    hard = batch_of(codec, "{text} it was {target} it is a .")
    prompt = SoftPrompt(tokens=embed_text(backbone, "it is a"))
    assert_close(real(soft, backbone(soft, prompt)), real(hard, backbone(hard)), **CLOSE)


@pytest.mark.parametrize("side", SIDES)
def test_two_blocks_act_like_words_at_two_positions(backbone, side):
    codec = on_side(backbone.codec, side)
    soft = batch_of(codec, "it is{soft} {text} never{soft} dull {target}")
    hard = batch_of(codec, "it is a very {text} never dog was sad dull {target}")
    prompt = SoftPrompt(tokens=embed_text(backbone, "a very dog was sad"), blocks=(2, 3))
    assert_close(real(soft, backbone(soft, prompt)), real(hard, backbone(hard)), **CLOSE)


def test_each_row_may_have_its_own_soft_tokens(backbone):
    words = ["it is a", "a sad dog", "never was well", "good . ."]
    soft = batch_of(backbone.codec, TEMPLATES["middle"])
    logits = backbone(soft, SoftPrompt(tokens=torch.cat([embed_text(backbone, w) for w in words])))
    for b, (word, text, target) in enumerate(zip(words, TEXTS, TARGETS, strict=True)):
        hard = batch_of(backbone.codec, f"{{text}} {word} it was {{target}}", [text], [target])
        assert_close(logits[b : b + 1, : hard.targets.shape[1]], backbone(hard), **CLOSE)


@pytest.mark.parametrize("side", SIDES)
def test_a_shift_by_the_difference_of_embeddings_acts_like_other_words(backbone, side):
    batch = batch_of(on_side(backbone.codec, side))
    others = torch.where(batch.source, (batch.input_ids + 7) % V, batch.input_ids)
    replaced = replace(batch, input_ids=others)
    shift = backbone.embed(others) - backbone.embed(batch.input_ids)
    shift = torch.where(batch.mask[..., None], shift, torch.full_like(shift, 9.0))  # not used on padding
    assert_close(backbone(batch, SoftPrompt(shift=shift)), backbone(replaced), **CLOSE)
    both = SoftPrompt(shift=shift, tokens=embed_text(backbone, "it is a"))
    assert_close(backbone(batch, both), backbone(replaced, SoftPrompt(tokens=both.tokens)), **CLOSE)


def test_generation_with_soft_tokens_equals_generation_with_words(backbone, family):
    decoding = {} if family in MASKED else {"max_new_tokens": 4}
    soft = batch_of(backbone.codec, TEMPLATES["middle"])
    hard = batch_of(backbone.codec, "{text} it is a it was {target}")
    output = backbone.generate(soft, SoftPrompt(tokens=embed_text(backbone, "it is a")), **decoding)
    assert torch.equal(output, backbone.generate(hard, **decoding))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "bert"])  # T5 has no window
def test_a_row_beyond_the_window_is_an_error_with_advice(backbone):
    tokens = torch.randn(1, backbone.window, backbone.hidden_size)
    with pytest.raises(ValueError, match=r"window of 48; lower .*max_tokens"):
        backbone(batch_of(backbone.codec), SoftPrompt(tokens=tokens))


# Objectives against loops over rows that are not padded


def each_alone(lm, template=TEMPLATES["front"], targets=TARGETS, texts=TEXTS):
    """Logits [U, V] and targets of every row, one forward pass each."""
    for row in encode_rows(lm.backbone.codec, template, texts, targets):
        yield lm(lm.backbone.codec.collate([row]))[0], row.targets


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("side", SIDES)
def test_language_modeling_is_the_mean_over_all_target_tokens(backbone, prompted, side, smoothing):
    losses = []
    for logits, targets in each_alone(prompted()):
        for u, token in enumerate(targets):
            probability = logits[u].softmax(-1)
            losses.append(-(1 - smoothing) * probability[token].log() - smoothing * probability.log().mean())
    batch = batch_of(on_side(backbone.codec, side))
    loss = LanguageModeling(label_smoothing=smoothing)(prompted(), batch).loss
    assert_close(loss, torch.stack(losses).mean(), **CLOSE)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_is_the_mean_over_rows_of_the_class_probability(backbone, prompted, smoothing):
    labels = (2, 0, 1, 1)
    batch = batch_of(backbone.codec, labels=labels)
    lm = prompted(LabelWords(backbone.codec, CLASSES))
    losses = []
    for scores, label in zip(lm.scores(batch), labels, strict=True):
        probability = scores.exp() / scores.exp().sum()
        losses.append(-(1 - smoothing) * probability[label].log() - smoothing * probability.log().mean())
    assert_close(Classification(smoothing)(lm, batch).loss, torch.stack(losses).mean(), **CLOSE)


# Readouts against loops


@pytest.mark.parametrize(
    ("aggregate", "put_together"),
    [("sum", lambda words: words.exp().sum().log()), ("mean", torch.mean), ("max", torch.max)],
)
def test_label_words_are_read_at_the_first_target(backbone, prompted, aggregate, put_together):
    scores = LabelWords(backbone.codec, CLASSES, aggregate)(prompted(), batch_of(backbone.codec))
    for b, (logits, _) in enumerate(each_alone(prompted())):
        for c, words in enumerate(CLASSES.words.values()):
            ids = [backbone.codec.ids(word)[0] for word in words]
            assert_close(scores[b, c], put_together(logits[0, ids]), **CLOSE)


CHOICES = Classes({"one": [" very good indeed"], "two": [" bad"], "three": [" never ends"]})


def log_probabilities(lm, template, texts=TEXTS, choices=CHOICES):
    """[B, C] by writing every row with every candidate, and adding the logarithms of its tokens' probabilities."""
    scores = torch.zeros(len(texts), len(choices))
    for c, (word,) in enumerate(choices.words.values()):
        for b, (logits, tokens) in enumerate(each_alone(lm, template, [word.strip()] * len(texts), texts)):
            scores[b, c] = sum(logits[u].softmax(-1)[token].log() for u, token in enumerate(tokens))
    return scores


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_ranked_choices_add_up_the_tokens_of_each_candidate(backbone, prompted, template, side):
    batch = batch_of(on_side(backbone.codec, side), template)
    scores = RankedChoices(on_side(backbone.codec, side), CHOICES)(prompted(), batch)
    assert_close(scores, log_probabilities(prompted(), template), **CLOSE)


@pytest.mark.parametrize(("normalize", "sizes"), [("tokens", [3, 1, 2]), ("characters", [17, 4, 11])])
def test_ranked_choices_may_be_divided_by_their_length(backbone, prompted, normalize, sizes):
    scores = RankedChoices(backbone.codec, CHOICES, normalize=normalize)(prompted(), batch_of(backbone.codec))
    assert_close(scores, log_probabilities(prompted(), TEMPLATES["front"]) / torch.tensor(sizes), **CLOSE)


def test_ranked_choices_with_a_premise_are_pointwise_mutual_information(backbone, prompted):
    premise = "{soft}the label is {target}"
    scores = RankedChoices(backbone.codec, CHOICES, premise=premise)(prompted(), batch_of(backbone.codec))
    gained = log_probabilities(prompted(), TEMPLATES["front"]) - log_probabilities(prompted(), premise, TEXTS[:1])
    assert_close(scores, gained, **CLOSE)


def test_calibration_divides_by_the_mean_probability_without_content(backbone, prompted):
    fillers = ("what ?", "", "film")
    readout, plain = Calibrated(backbone.codec, CLASSES, fillers=fillers), LabelWords(backbone.codec, CLASSES)
    batch = batch_of(backbone.codec, targets=["good"] * len(TEXTS))
    empty = [batch_of(backbone.codec, CLASSES.template, [filler], ["good"]) for filler in fillers]
    free = sum(plain(prompted(), row).softmax(-1) for row in empty) / len(fillers)
    odds = plain(prompted(), batch).softmax(-1) / free
    assert_close(readout(prompted(), batch), odds.log(), **CLOSE)


def test_calibration_makes_classes_equal_where_there_is_no_content(backbone, prompted):
    readout = Calibrated(backbone.codec, CLASSES, fillers=["what ?"])
    scores = readout(prompted(), batch_of(backbone.codec, CLASSES.template, ["what ?"], ["good"]))
    assert_close(scores.softmax(-1), torch.full((1, 3), 1 / 3), **CLOSE)


def test_label_words_of_several_tokens_are_refused(backbone):
    with pytest.raises(ValueError, match="' very good' is 2 tokens"):
        LabelWords(backbone.codec, Classes({"a": [" very good"], "b": [" bad"]}))


def test_two_classes_with_one_word_are_refused(backbone):
    with pytest.raises(ValueError, match="classes 'a' and 'b' share the label word 'bad'"):
        LabelWords(backbone.codec, Classes({"a": [" bad"], "b": [" good", " bad"]}))


def test_a_premise_names_no_column(backbone):
    with pytest.raises(ValueError, match="must not name columns"):
        RankedChoices(backbone.codec, CHOICES, premise="{text} {target}")


# Metrics against scikit-learn


class FixedScores:
    """A language model with fixed scores."""

    def __init__(self, scores):
        self.fixed = scores

    def scores(self, batch):
        return self.fixed


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 1, 3)], ids=["all classes", "one that never occurs"])
@pytest.mark.parametrize("sizes", [(60,), (7, 1, 32, 20)], ids=["one batch", "uneven batches"])
def test_classification_metrics_equal_scikit_learn(sizes, present):
    names = ("a", "b", "c", "d")
    labels = torch.tensor(present)[torch.randint(len(present), (60,))]
    scores = torch.randn(60, 4)
    scores[:, [c for c in range(4) if c not in present]] = -9.0
    evaluation = ClassificationEvaluation(names)
    for _ in range(2):  # a pass forgets the one before
        evaluation.reset()
        for s, y in zip(scores.split(sizes), labels.split(sizes), strict=True):
            evaluation.update(FixedScores(s), Labelled(y))
    predictions, true = scores.argmax(-1).numpy(), labels.numpy()
    scored = metrics.precision_recall_fscore_support(true, predictions, average=None, labels=range(4), zero_division=0)
    each = dict(zip(("precision", "recall", "f1"), scored[:3], strict=True))
    expected = {
        "accuracy": metrics.accuracy_score(true, predictions),
        "macro_f1": metrics.f1_score(true, predictions, average="macro"),
        "mcc": metrics.matthews_corrcoef(true, predictions),
        "cross_entropy": metrics.log_loss(true, scores.double().softmax(-1).numpy(), labels=range(4)),
        **{f"{what}/{n}": value for what, of in each.items() for n, value in zip(names, of, strict=True)},
        **{f"predicted/{name}": (predictions == c).mean() for c, name in enumerate(names)},
    }
    measured = {name: float(value) for name, value in evaluation.compute().items()}
    assert measured == pytest.approx(expected, abs=1e-6)


class Labelled:
    """A batch of labels."""

    def __init__(self, labels):
        self.labels = labels


def test_records_contain_prediction_probabilities_and_target():
    evaluation = ClassificationEvaluation(("a", "b"))
    lm, batch = FixedScores(torch.tensor([[0.0, 2.0], [1.0, 1.0 - 1e-3]])), Labelled(torch.tensor([0, 0]))
    records = evaluation.update(lm, batch)
    assert [(r["prediction"], r["target"]) for r in records] == [("b", "a"), ("a", "a")]
    assert records[0]["scores"] == pytest.approx({"a": 0.119203, "b": 0.880797}, abs=1e-6)  # 1 / (1 + e^2)
    assert evaluation.predict(lm, batch) == [{k: v for k, v in r.items() if k != "target"} for r in records]


# Intervals


@pytest.mark.parametrize(("level", "quantile"), [(0.95, 1.959964), (0.8, 1.281552)])  # of the standard normal
def test_the_bootstrap_of_many_rows_is_the_normal_approximation(level, quantile):
    values = torch.randn(500, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    half = quantile * float(values.std(correction=0)) / len(values) ** 0.5
    low, high = bootstrap(values.tolist(), level=level, draws=4000)
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.1 * half)
    assert (low, high) == bootstrap(values.tolist(), level=level, draws=4000)
    assert (low, high) != bootstrap(values.tolist(), level=level, draws=4000, seed=1)
