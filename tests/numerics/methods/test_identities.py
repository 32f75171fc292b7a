"""Equalities for arbitrary weights: soft tokens and words, batches and loops, metrics and their reference."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest
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
def build_lm(backbone):
    """A function from a readout to a language model with a prompt of four random tokens."""
    tokens = torch.randn(1, 4, backbone.hidden_size)

    def build(readout=None):
        return PromptedLM(backbone, lambda batch: SoftPrompt(tokens=tokens), readout)

    return build


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
def test_a_soft_prompt_of_word_embeddings_has_the_effect_of_the_words(backbone, soft, hard, side):
    codec = on_side(backbone.codec, side)
    with_slots, words = batch_of(codec, soft), batch_of(codec, hard)
    prompt = SoftPrompt(tokens=embed_text(backbone, "it is a"))
    assert_close(real(with_slots, backbone(with_slots, prompt)), real(words, backbone(words)), **CLOSE)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_word_embeddings_after_the_answer_have_the_effect_of_the_words(backbone, side):
    codec = on_side(backbone.codec, side)
    soft = batch_of(codec, "{text} it was {target}{soft} .")
    hard = batch_of(codec, "{text} it was {target} it is a .")
    prompt = SoftPrompt(tokens=embed_text(backbone, "it is a"))
    assert_close(real(soft, backbone(soft, prompt)), real(hard, backbone(hard)), **CLOSE)


@pytest.mark.parametrize("side", SIDES)
def test_two_blocks_have_the_effect_of_words_at_two_positions(backbone, side):
    codec = on_side(backbone.codec, side)
    soft = batch_of(codec, "it is{soft} {text} never{soft} dull {target}")
    hard = batch_of(codec, "it is a very {text} never dog was sad dull {target}")
    prompt = SoftPrompt(tokens=embed_text(backbone, "a very dog was sad"), blocks=(2, 3))
    assert_close(real(soft, backbone(soft, prompt)), real(hard, backbone(hard)), **CLOSE)


def test_each_row_can_have_different_soft_tokens(backbone):
    words = ["it is a", "a sad dog", "never was well", "good . ."]
    soft = batch_of(backbone.codec, TEMPLATES["middle"])
    logits = backbone(soft, SoftPrompt(tokens=torch.cat([embed_text(backbone, w) for w in words])))
    for b, (word, text, target) in enumerate(zip(words, TEXTS, TARGETS, strict=True)):
        hard = batch_of(backbone.codec, f"{{text}} {word} it was {{target}}", [text], [target])
        assert_close(logits[b : b + 1, : hard.targets.shape[1]], backbone(hard), **CLOSE)


@pytest.mark.parametrize("side", SIDES)
def test_a_shift_by_the_difference_of_embeddings_has_the_effect_of_other_words(backbone, side):
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


# Objectives compared with loops over rows without padding


def run_each_row(lm, template=TEMPLATES["front"], targets=TARGETS, texts=TEXTS):
    """Yield logits [U, V] and targets of every row, with one forward pass for each."""
    for row in encode_rows(lm.backbone.codec, template, texts, targets):
        yield lm(lm.backbone.codec.collate([row]))[0], row.targets


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("side", SIDES)
def test_language_modeling_is_the_mean_over_all_target_tokens(backbone, build_lm, side, smoothing):
    losses = []
    for logits, targets in run_each_row(build_lm()):
        for u, token in enumerate(targets):
            log_probability = logits[u].log_softmax(-1)
            losses.append(-(1 - smoothing) * log_probability[token] - smoothing * log_probability.mean())
    batch = batch_of(on_side(backbone.codec, side))
    loss = LanguageModeling(label_smoothing=smoothing)(build_lm(), batch).loss
    assert_close(loss, torch.stack(losses).mean(), **CLOSE)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_is_the_mean_over_rows_of_the_class_probability(backbone, build_lm, smoothing):
    labels = (2, 0, 1, 1)
    batch = batch_of(backbone.codec, labels=labels)
    lm = build_lm(LabelWords(backbone.codec, CLASSES))
    losses = []
    for scores, label in zip(lm.scores(batch), labels, strict=True):
        log_probability = (scores.exp() / scores.exp().sum()).log()
        losses.append(-(1 - smoothing) * log_probability[label] - smoothing * log_probability.mean())
    assert_close(Classification(smoothing)(lm, batch).loss, torch.stack(losses).mean(), **CLOSE)


# Readouts compared with loops


@pytest.mark.parametrize(
    ("aggregate", "combine"),
    [("sum", lambda words: words.exp().sum().log()), ("mean", torch.mean), ("max", torch.max)],
)
def test_label_words_are_read_at_the_first_target(backbone, build_lm, aggregate, combine):
    scores = LabelWords(backbone.codec, CLASSES, aggregate)(build_lm(), batch_of(backbone.codec))
    for b, (logits, _) in enumerate(run_each_row(build_lm())):
        for c, words in enumerate(CLASSES.words.values()):
            ids = [backbone.codec.ids(word)[0] for word in words]
            assert_close(scores[b, c], combine(logits[0, ids]), **CLOSE)


CHOICES = Classes({"one": [" very good indeed"], "two": [" bad"], "three": [" never ends"]})


def log_probabilities(lm, template, texts=TEXTS, choices=CHOICES):
    """Return [B, C]: for every row with every candidate, the sum of the log-probabilities of its tokens."""
    scores = torch.zeros(len(texts), len(choices))
    for c, (word,) in enumerate(choices.words.values()):
        targets = [word.strip()] * len(texts)
        for b, (logits, tokens) in enumerate(run_each_row(lm, template, targets, texts)):
            log_probability = logits.log_softmax(-1)
            scores[b, c] = sum(log_probability[u, token] for u, token in enumerate(tokens))
    return scores


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_ranked_choices_sum_over_the_tokens_of_each_candidate(backbone, build_lm, template, side):
    batch = batch_of(on_side(backbone.codec, side), template)
    scores = RankedChoices(on_side(backbone.codec, side), CHOICES)(build_lm(), batch)
    assert_close(scores, log_probabilities(build_lm(), template), **CLOSE)


@pytest.mark.parametrize(("normalize", "sizes"), [("tokens", [3, 1, 2]), ("characters", [17, 4, 11])])
def test_scores_of_ranked_choices_can_be_divided_by_their_length(backbone, build_lm, normalize, sizes):
    scores = RankedChoices(backbone.codec, CHOICES, normalize=normalize)(build_lm(), batch_of(backbone.codec))
    assert_close(scores, log_probabilities(build_lm(), TEMPLATES["front"]) / torch.tensor(sizes), **CLOSE)


def test_ranked_choices_with_a_premise_are_pointwise_mutual_information(backbone, build_lm):
    premise = "{soft}the label is {target}"
    scores = RankedChoices(backbone.codec, CHOICES, premise=premise)(build_lm(), batch_of(backbone.codec))
    with_text = log_probabilities(build_lm(), TEMPLATES["front"])
    without_text = log_probabilities(build_lm(), premise, TEXTS[:1])
    assert_close(scores, with_text - without_text, **CLOSE)


def test_calibration_divides_by_the_mean_probability_without_content(backbone, build_lm):
    fillers = ("what ?", "", "film")
    readout, plain = Calibrated(backbone.codec, CLASSES, fillers=fillers), LabelWords(backbone.codec, CLASSES)
    batch = batch_of(backbone.codec, targets=["good"] * len(TEXTS))
    without_content = [batch_of(backbone.codec, CLASSES.template, [filler], ["good"]) for filler in fillers]
    prior = sum(plain(build_lm(), row).softmax(-1) for row in without_content) / len(fillers)
    odds = plain(build_lm(), batch).softmax(-1) / prior
    assert_close(readout(build_lm(), batch), odds.log(), **CLOSE)


def test_calibration_gives_equal_scores_without_content(backbone, build_lm):
    readout = Calibrated(backbone.codec, CLASSES, fillers=["what ?"])
    scores = readout(build_lm(), batch_of(backbone.codec, CLASSES.template, ["what ?"], ["good"]))
    assert_close(scores.softmax(-1), torch.full((1, 3), 1 / 3), **CLOSE)


def test_label_words_of_several_tokens_are_rejected(backbone):
    with pytest.raises(ValueError, match="' very good' is 2 tokens"):
        LabelWords(backbone.codec, Classes({"a": [" very good"], "b": [" bad"]}))


def test_two_classes_with_one_label_word_are_rejected(backbone):
    with pytest.raises(ValueError, match="classes 'a' and 'b' share the label word 'bad'"):
        LabelWords(backbone.codec, Classes({"a": [" bad"], "b": [" good", " bad"]}))


def test_a_premise_with_a_column_is_rejected(backbone):
    with pytest.raises(ValueError, match="must not name columns"):
        RankedChoices(backbone.codec, CHOICES, premise="{text} {target}")


# Metrics compared with scikit-learn


class FixedScores:
    """A language model with fixed scores."""

    def __init__(self, scores):
        self.fixed = scores

    def scores(self, batch):
        return self.fixed


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 1, 3)], ids=["all classes", "a class that never occurs"])
@pytest.mark.parametrize("sizes", [(60,), (7, 1, 32, 20)], ids=["one batch", "uneven batches"])
def test_classification_metrics_equal_scikit_learn(sizes, present):
    names = ("a", "b", "c", "d")
    labels = torch.tensor(present)[torch.randint(len(present), (60,))]
    scores = torch.randn(60, 4)
    scores[:, [c for c in range(4) if c not in present]] = -9.0
    evaluation = ClassificationEvaluation(names)
    for _ in range(2):  # the reset discards the first pass
        evaluation.begin("test", 0)
        for s, y in zip(scores.split(sizes), labels.split(sizes), strict=True):
            evaluation.update(FixedScores(s), LabeledBatch(y))
    predictions, true = scores.argmax(-1).numpy(), labels.numpy()
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        true, predictions, average=None, labels=range(4), zero_division=0
    )
    expected = {
        "accuracy": metrics.accuracy_score(true, predictions),
        "macro_f1": metrics.f1_score(true, predictions, average="macro"),
        "mcc": metrics.matthews_corrcoef(true, predictions),
        "cross_entropy": metrics.log_loss(true, scores.double().softmax(-1).numpy(), labels=range(4)),
    }
    for c, name in enumerate(names):
        expected |= {f"precision/{name}": precision[c], f"recall/{name}": recall[c], f"f1/{name}": f1[c]}
        expected[f"predicted/{name}"] = (predictions == c).mean()
    interval = binomtest(int((predictions == true).sum()), 60).proportion_ci(method="wilson")
    expected |= {"accuracy_low": interval.low, "accuracy_high": interval.high}
    measured = {name: float(value) for name, value in evaluation.compute().items()}
    assert measured == pytest.approx(expected, abs=1e-6)


class LabeledBatch:
    """A batch of labels."""

    def __init__(self, labels):
        self.labels = labels


def test_records_contain_prediction_probabilities_and_target():
    evaluation = ClassificationEvaluation(("a", "b"))
    lm = FixedScores(torch.tensor([[0.0, 2.0], [1.0, 1.0 - 1e-3]]))
    batch = LabeledBatch(torch.tensor([0, 0]))
    records = evaluation.update(lm, batch)
    assert [(r["prediction"], r["target"]) for r in records] == [("b", "a"), ("a", "a")]
    assert records[0]["scores"] == pytest.approx({"a": 0.119203, "b": 0.880797}, abs=1e-6)  # 1 / (1 + e^2)
    for record in records:
        del record["target"]
    assert evaluation.predict(lm, batch) == records


# Intervals


@pytest.mark.parametrize(("level", "quantile"), [(0.95, 1.959964), (0.8, 1.281552)])  # of the standard normal
def test_the_bootstrap_of_many_rows_is_the_normal_approximation(level, quantile):
    values = torch.randn(500, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    mean, deviation = float(values.mean()), float(values.std(correction=0))
    half = quantile * deviation / len(values) ** 0.5
    low, high = bootstrap(values.tolist(), level=level, draws=4000)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert (low, high) == bootstrap(values.tolist(), level=level, draws=4000)
    assert (low, high) != bootstrap(values.tolist(), level=level, draws=4000, seed=1)
