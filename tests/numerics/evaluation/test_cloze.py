"""Cloze questions and losses of words by frequency, compared with loops over transformers' models."""

import math
from collections import Counter

import pytest
import torch

import lightning_softprompt as sp
from lightning_softprompt.core.types import WindowExample
from lightning_softprompt.data.corpus.cloze import draw_questions
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.evaluation.likelihood import LikelihoodEvaluation
from lightning_softprompt.evaluation.metrics.intervals import bootstrap_ratio
from lightning_softprompt.evaluation.words.cloze import ClozeQuestion, ClozeTest, summarize_results
from lightning_softprompt.evaluation.words.word_counts import count_words
from lightning_softprompt.evaluation.words.word_nats import WordNats

TEMPLATE = sp.Template("{soft}{target}")
QUESTIONS = [
    ClozeQuestion("a warm and", "wonder ful", " dog is sad .", ("one bad", "long story", "very good"), 0),
    ClozeQuestion("this film was", "long story", " . it never ends", ("wonder ful", "bad dog", "good text"), 0),
    ClozeQuestion("it is about a", "bad dog", "", ("very good", "sad story", "wonder ful"), 1),
]


@pytest.fixture
def bare(load, tiny_folder):
    """Returns the backbone of a family without a prompt, as methods use it."""

    def make(family):
        module = sp.NoPrompt(backbone=sp.BackboneSpec(name=str(tiny_folder(family))))
        module.attach(load(family))
        return module.eval().lm()

    return make


def log_probabilities(lm, ids):
    with torch.no_grad():
        return lm.backbone.model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_decoder_scores_a_candidate_with_the_text_after_it(bare, question):
    lm = bare("llama")
    codec = lm.backbone.codec
    result = ClozeTest(lambda: (QUESTIONS, 3), TEMPLATE, 48).ask(lm, question, torch.device("cpu"))
    left = [*codec.start, *codec.ids(question.left)]
    scores = {}
    for candidate in question.candidates:
        target = codec.ids(f" {candidate}{question.right}")
        rows = log_probabilities(lm, [*left, *target])[len(left) - 1 : -1]
        scores[candidate] = float(rows[range(len(target)), target].sum())
    assert result["chosen"] == max(scores, key=scores.get)
    assert result["correct"] == (result["chosen"] == question.term)
    greedy, term = list(left), codec.ids(f" {question.term}")
    for _ in term:
        greedy.append(int(log_probabilities(lm, greedy)[-1].argmax()))
    assert result["exact"] == (greedy[len(left) :] == term)


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_encoder_predicts_all_masked_tokens_of_a_term(bare, question):
    lm = bare("bert")
    codec = lm.backbone.codec
    result = ClozeTest(lambda: (QUESTIONS, 3), TEMPLATE, 48).ask(lm, question, torch.device("cpu"))
    left, term = [*codec.start, *codec.ids(question.left)], codec.ids(f" {question.term}")
    ids = [*left, *[codec.mask_id] * len(term), *codec.ids(question.right), *codec.end]
    rows = log_probabilities(lm, ids)[len(left) : len(left) + len(term)]
    correct = rows.argmax(-1).tolist()
    assert result["share"] == sum(a == b for a, b in zip(correct, term, strict=True)) / len(term)
    assert result["exact"] == (correct == term)
    tokens = {candidate: codec.ids(f" {candidate}") for candidate in question.candidates}
    scores = {candidate: float(rows[range(len(ids)), ids].sum()) for candidate, ids in tokens.items()}
    assert result["chosen"] == max(scores, key=scores.get)


def test_a_predicted_term_is_exact(bare):
    """The greedy continuation of a text is a term that is predicted exactly."""
    lm = bare("llama")
    codec = lm.backbone.codec
    left = "a warm and"
    ids = [*codec.start, *codec.ids(left)]
    predicted = [int(log_probabilities(lm, ids)[-1].argmax())]
    predicted.append(int(log_probabilities(lm, ids + predicted)[-1].argmax()))
    term = codec.tokenizer.decode(predicted)
    question = ClozeQuestion(left, term, "", ("one bad",))
    result = ClozeTest(lambda: ([question], 1), TEMPLATE, 48).ask(lm, question, torch.device("cpu"))
    assert codec.ids(f" {term}") == predicted
    assert result["exact"]
    assert result["correct"]
    assert result["share"] == 1


def test_each_question_is_asked_once_also_with_limited_rows():
    test = ClozeTest(lambda: (QUESTIONS, 10), TEMPLATE, 48)
    assert list(test.assign(None)) == [0, 3, 6]
    assert test.assign([4, 8]) == {4: QUESTIONS[:2], 8: QUESTIONS[2:]}
    assert test.assign([7]) == {7: QUESTIONS}


def test_metrics_are_means_and_the_interval_resamples_documents():
    results = [
        {"correct": correct, "exact": correct, "share": share, "document": document}
        for correct, share, document in [(True, 1.0, 0), (True, 1.0, 0), (False, 0.5, 1), (False, 0.0, 2)]
    ]
    metrics = summarize_results(results, "inside", with_intervals=True)
    assert (metrics["cloze@1"], metrics["cloze_joint"], metrics["cloze_tokens"]) == (0.5, 0.5, 0.625)
    interval = metrics["cloze@1_low"], metrics["cloze@1_high"]
    assert interval == bootstrap_ratio([2.0, 0.0, 0.0], [2.0, 1.0, 1.0])
    assert "cloze_greedy" in summarize_results(results, "end", with_intervals=False)


class Letters:
    """A codec with one token for each letter."""

    class tokenizer:  # noqa: N801
        unk_token_id = None

    def ids(self, text):
        return [ord(letter) for letter in text.strip()]


RARE = [f"rare{letter}" for letter in "abcdefghijkl"]  # more than nine others


def windows_of(texts):
    return [WindowExample({}, text, document=number) for number, text in enumerate(texts)]


def test_drawn_terms_are_rare_and_their_distractors_of_the_same_kind():
    counts = Counter({**dict.fromkeys([*RARE, "RareN"], 6), "often": 60, "unique": 5, "general": 6, "longerterm": 6})
    texts = [f"here we see {term}, often unique general RareN longerterm" for term in RARE * 3]
    texts += [f"here we see {term} and {term}" for term in RARE]  # the second one could be copied
    questions = draw_questions(windows_of(texts), counts, {"general": 1}, Letters(), 100, seed=0)
    assert {question.term for question in questions} == set(RARE)
    assert max(Counter(question.term for question in questions).values()) == 2
    for question in questions:
        assert len(question.distractors) == 9
        assert set(question.distractors) < set(RARE) - {question.term}
        text = f"{question.left} {question.term}{question.right}"
        assert text == texts[question.document]
    assert questions == draw_questions(windows_of(texts), counts, {"general": 1}, Letters(), 100, seed=0)
    assert questions[:5] == draw_questions(windows_of(texts), counts, {"general": 1}, Letters(), 5, seed=0)
    with pytest.raises(DataError, match="no rare term, out of 12 words"):
        draw_questions(windows_of(["nothing rare is in here"]), counts, {}, Letters(), 5, seed=0)


def test_words_have_the_losses_of_their_tokens(bare):
    lm = bare("llama")
    codec = lm.backbone.codec
    text = "a warm dog. a dog is warm , never"
    counts = count_words(["dog " * 120, "warm warm A", "Dog."])
    assert counts["dog"] == 121
    row = codec.encode(TEMPLATE.pieces({}), text)
    batch = codec.collate([row], examples=[WindowExample({}, text, num_bytes=len(text), num_words=len(text.split()))])
    evaluation = LikelihoodEvaluation(word_nats=WordNats(lambda: counts))
    evaluation.begin("test", 0)
    with torch.no_grad():
        losses = lm.cross_entropy(batch)[0].tolist()
        evaluation.update(lm, batch)
    metrics = evaluation.compute()
    tokens = text.replace(".", " .").split()
    of_words = {"0": [], "1-4": [], "100+": []}
    for token, loss in zip(tokens, losses, strict=True):
        name = "100+" if token in ("dog", ".") else "1-4" if token in ("a", "warm") else "0"
        of_words[name].append(loss)
    num_words = {"0": 3, "1-4": 4, "100+": 2}
    for name, of_word in of_words.items():
        assert float(metrics[f"nats_by_frequency/{name}"]) == pytest.approx(sum(of_word) / num_words[name], rel=1e-5)
    assert "nats_by_frequency/5-19" not in metrics
    assert math.isclose(sum(losses), sum(map(sum, of_words.values())), rel_tol=1e-9)
