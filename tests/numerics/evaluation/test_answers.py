"""Answers beside right ones: the SQuAD metric of torchmetrics, and loops; documents found: trec_eval, and loops."""

import math
import random
import unicodedata

import numpy as np
import pytest
import pytrec_eval
from torchmetrics.functional.text import squad

from lightning_softprompt.evaluation.metrics.answers import (
    answer_scores,
    answer_words,
    contain_answer,
    contains_words,
    content_words,
    grounded_fraction,
    overlap,
    same_answer,
)
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.retrieval import KS, RetrievalScores, retrieval_names, retrieval_scores

PIECES = """
    the The a an A An theatre another Paris PARIS paris, (Paris) don't U.S. $5 5% well-known _ -- ' "New York" new york
    1,000 1.5 of in on and it's <b> a.m. & ! the, an' "the"
""".split()  # noqa: SIM905


def texts(generator, low=0):
    return "  ".join(generator.choices(PIECES, k=generator.randint(low, 6)))


@pytest.mark.parametrize("seed", range(150))
def test_squad_scores_are_those_of_torchmetrics(seed):
    generator = random.Random(seed)
    said, right = texts(generator), [texts(generator) for _ in range(generator.randint(1, 3))]
    right[0] = said.upper() + " !" if seed % 5 == 0 else right[0]
    right = [text if content_words(text) else "Paris" for text in right]  # SQuAD accepts no answer for articles alone
    answers = {"answer_start": [0] * len(right), "text": right}
    expected = squad({"prediction_text": said, "id": "0"}, {"answers": answers, "id": "0"})
    measured = answer_scores(said, right)
    assert 100 * measured["exact_match"] == pytest.approx(float(expected["exact_match"]))
    assert 100 * measured["f1"] == pytest.approx(float(expected["f1"]), rel=1e-6)


def test_precision_and_recall_are_those_of_the_best_reference():
    measured = answer_scores("in the city of Paris", ["Lyon", "Paris", "city of light"])
    assert measured["precision"] == pytest.approx(2 / 4)  # in city of paris, beside city of light
    assert measured["recall"] == pytest.approx(2 / 3)
    assert measured["f1"] == pytest.approx(4 / 7)
    assert (measured["exact_match"], measured["contains"]) == (0, 1)


@pytest.mark.parametrize("seed", range(50))
def test_overlap_crosses_words_off_one_by_one(seed):
    generator = random.Random(seed)
    said, right = (generator.choices("abcd", k=generator.randint(1, 8)) for _ in range(2))
    left, shared = list(right), 0
    for word in said:
        if word in left:
            left.remove(word)
            shared += 1
    f1 = 2 * shared / (len(said) + len(right))
    assert overlap(said, right) == pytest.approx((shared / len(said), shared / len(right), f1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("São Paulo", ["são", "paulo"]),
        (unicodedata.normalize("NFD", "São Paulo"), ["são", "paulo"]),
        ("«É» — ‘Água’…", ["é", "água"]),  # noqa: RUF001
        ("¿Dónde? €5", ["dónde", "5"]),
        ("STRASSE", ["strasse"]),
        ("Straße", ["strasse"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("o gato", ["o", "gato"]),
        ("The The", ["the", "the"]),
        ("?", ["?"]),
        ("首都是巴黎。", ["首", "都", "是", "巴", "黎"]),
        ("iPhone手机", ["iphone", "手", "机"]),
        ("\u200fשלום\u200f", ["שלום"]),  # noqa: RUF001
    ],
)
def test_words_of_any_script_lose_case_and_marks_but_no_accents(text, words):
    assert answer_words(text) == words


@pytest.mark.parametrize(
    ("right", "wrong", "same"),
    [
        ("A", ["", "?", "the", "B"], "a."),
        ("The The", ["", "the"], "the the!"),
        ("1.5", ["15", "1,5"], "$1.5"),
        ("-5", ["5"], "\u22125"),
        (".5", ["5"], ".5"),
        ("10:30", ["1030"], "10:30."),
        ("3/4", ["34"], "(3/4)"),
        ("1990-95", ["199095"], "1990\u201395"),
        ("1,500", ["1.500", "15"], "1500"),
        ("1,00,000", ["1"], "100000"),
        ("C++", ["C", "C#"], "c++"),
        ("O-", ["O+", "O"], "o-."),
        ("+", ["", "-"], "+"),
    ],
)
def test_articles_numbers_and_signs_are_answers_of_their_own(right, wrong, same):
    assert [answer_scores(answer, [right])["exact_match"] for answer in wrong] == [0.0] * len(wrong)
    assert answer_scores(same, [right]) == dict.fromkeys(("exact_match", "precision", "recall", "f1", "contains"), 1.0)


def test_an_article_that_is_the_answer_is_found_among_other_words():
    measured = answer_scores("The answer is A", ["A"])
    assert (measured["contains"], measured["recall"], measured["exact_match"]) == (1.0, 1.0, 0.0)


def test_answers_of_scripts_without_spaces_are_held_and_share_characters():
    assert contain_answer(["法国的首都是巴黎。"], ["巴黎"])
    assert not contain_answer(["法国的首都是巴黎。"], ["黎巴"])
    measured = answer_scores("首都是巴黎。", ["巴黎"])
    assert measured["f1"] == pytest.approx(2 * 2 / (5 + 2))
    assert measured["contains"] == 1.0
    assert answer_scores("ปารีส", ["กรุงปารีส"])["precision"] == 1.0
    assert grounded_fraction("巴黎", ["法国的首都是巴黎。"]) == 1.0


def test_accents_tell_words_apart():
    assert same_answer("AVÔ!", "avô")
    assert not same_answer("avô", "avó")


@pytest.mark.parametrize("seed", range(50))
def test_what_a_text_holds_is_found_by_a_window(seed):
    generator = random.Random(seed)
    text, part = (
        generator.choices(["a", "b", "ab"], k=7),
        generator.choices(["a", "b", "ab"], k=generator.randint(0, 3)),
    )
    windows = [text[i : i + len(part)] for i in range(len(text) - len(part) + 1)]
    assert contains_words(text, part) == (bool(part) and part in windows)


def test_grounded_is_the_share_of_words_that_stand_in_any_passage():
    passages = ["Paris is a city.", "Lyon, too"]
    assert grounded_fraction("The city Lyon, or Rome", passages) == pytest.approx(2 / 4)
    assert grounded_fraction("Cit", passages) == 0
    assert math.isnan(grounded_fraction("the", passages))
    assert math.isnan(grounded_fraction("Lyon", []))
    assert contain_answer(passages, ["Rome", "LYON too"])
    assert not contain_answer(passages, ["city Lyon", "the"])


def questions():
    generator = random.Random(0)
    for _ in range(200):
        documents = [f"d{i}" for i in range(14)]
        found = generator.choices(documents, k=generator.randint(0, 16))  # some are found twice
        yield found, generator.sample(documents, generator.randint(1, 6))


def once(found):
    kept = []
    for document in found:
        if document not in kept:
            kept.append(document)
    return kept


def looped(found, gold, k):
    """Hit, recall, precision and nDCG at k, counted one by one."""
    right, gain, best = 0, 0.0, 0.0
    for place, document in enumerate(once(found)):
        if place < k and document in gold:
            right += 1
            gain += 1 / math.log2(place + 2)
    for place in range(k):
        if place < len(gold):
            best += 1 / math.log2(place + 2)
    return {"hit": min(right, 1), "recall": right / len(gold), "precision": right / k, "ndcg": gain / best}


def test_retrieval_measures_are_those_of_a_loop():
    for found, gold in questions():
        measured = retrieval_scores(found, gold)
        for k in KS:
            for name, value in looped(found, gold, k).items():
                assert measured[f"{name}@{k}"] == pytest.approx(value)
        ranks = [place + 1 for place, document in enumerate(once(found)) if document in gold]
        assert measured["mrr"] == pytest.approx(1 / min(ranks) if ranks else 0)
        assert tuple(measured) == retrieval_names()


def test_retrieval_measures_are_those_of_trec_eval():
    asked = {str(number): pair for number, pair in enumerate(questions()) if pair[0]}  # it has no empty rankings
    right = {number: dict.fromkeys(gold, 1) for number, (_, gold) in asked.items()}
    ranking = {
        number: {document: -place for place, document in enumerate(once(found))} for number, (found, _) in asked.items()
    }
    cuts = ",".join(map(str, KS))
    wanted = {f"success.{cuts}", f"recall.{cuts}", f"P.{cuts}", f"ndcg_cut.{cuts}", "recip_rank"}
    expected = pytrec_eval.RelevanceEvaluator(right, wanted).evaluate(ranking)
    assert len(expected) == len(asked) > 180
    for number, (found, gold) in asked.items():
        measured = retrieval_scores(found, gold)
        for ours, theirs in (("hit", "success"), ("recall", "recall"), ("precision", "P"), ("ndcg", "ndcg_cut")):
            for k in KS:
                assert measured[f"{ours}@{k}"] == pytest.approx(expected[number][f"{theirs}_{k}"])
        assert measured["mrr"] == pytest.approx(expected[number]["recip_rank"])


def test_a_worked_ranking():
    """Right documents at ranks 1, 3 and 6 of 6, of 4 that there are."""
    measured = retrieval_scores(["a", "x", "b", "y", "z", "c"], ["a", "b", "c", "d"])
    best = 1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)
    assert measured["ndcg@5"] == pytest.approx((1 + 1 / 2) / best)
    assert measured["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(7)) / best)
    assert (measured["recall@5"], measured["precision@5"], measured["precision@10"]) == (0.5, 0.4, 0.3)
    assert (measured["hit@1"], measured["mrr"]) == (1, 1)


def test_scores_of_many_questions_are_their_means_with_intervals():
    scores, values = RetrievalScores([5]), []
    for found, gold in questions():
        scores.add(found, gold)
        values.append(looped(found, gold, 5)["recall"])
    assert len(scores) == 200
    assert scores.means()["recall@5"] == pytest.approx(np.mean(values))
    assert scores.intervals()["recall@5"] == pytest.approx(bootstrap(values))
    assert set(scores.means()) == set(retrieval_names([5]))
    assert RetrievalScores().means() == RetrievalScores().intervals() == {}


def test_a_question_without_right_documents_is_refused():
    with pytest.raises(ValueError, match="a question has none; leave it out"):
        retrieval_scores(["a"], [])
