"""Metrics of answers compared with torchmetrics and loops, and of retrieved documents with trec_eval and loops."""

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


def random_text(generator):
    return "  ".join(generator.choices(PIECES, k=generator.randint(0, 6)))


def test_squad_scores_equal_torchmetrics():
    generator = random.Random(0)
    for n in range(150):
        prediction = random_text(generator)
        references = [random_text(generator) for _ in range(generator.randint(1, 3))]
        if n % 5 == 0:
            references[0] = f"{prediction.upper()} !"
        references = [text if content_words(text) else "Paris" for text in references]  # SQuAD ignores articles
        answers = {"answer_start": [0] * len(references), "text": references}
        expected = squad({"prediction_text": prediction, "id": "0"}, {"answers": answers, "id": "0"})
        scores = answer_scores(prediction, references)
        assert 100 * scores["exact_match"] == pytest.approx(float(expected["exact_match"])), (prediction, references)
        assert 100 * scores["f1"] == pytest.approx(float(expected["f1"]), rel=1e-6), (prediction, references)


def test_precision_and_recall_use_the_reference_with_the_best_f1():
    measured = answer_scores("in the city of Paris", ["Lyon", "Paris", "city of light"])
    assert measured["precision"] == pytest.approx(2 / 4)  # "in city of paris" and "city of light"
    assert measured["recall"] == pytest.approx(2 / 3)
    assert measured["f1"] == pytest.approx(4 / 7)
    assert (measured["exact_match"], measured["contains"]) == (0, 1)


def test_overlap_counts_each_word_of_the_reference_once():
    generator = random.Random(0)
    for _ in range(50):
        prediction, reference = (generator.choices("abcd", k=generator.randint(1, 8)) for _ in range(2))
        remaining, num_shared = list(reference), 0
        for word in prediction:
            if word in remaining:
                remaining.remove(word)
                num_shared += 1
        precision, recall = num_shared / len(prediction), num_shared / len(reference)
        f1 = 2 * num_shared / (len(prediction) + len(reference))
        assert overlap(prediction, reference) == pytest.approx((precision, recall, f1)), (prediction, reference)


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
def test_words_of_any_script_are_compared_without_case_and_punctuation_but_with_accents(text, words):
    assert answer_words(text) == words


@pytest.mark.parametrize(
    ("reference", "wrong", "equal"),
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
def test_articles_numbers_and_signs_can_be_answers(reference, wrong, equal):
    for answer in wrong:
        assert answer_scores(answer, [reference])["exact_match"] == 0, answer
    scores = answer_scores(equal, [reference])
    assert scores == dict.fromkeys(("exact_match", "precision", "recall", "f1", "contains"), 1.0)


def test_an_article_that_is_the_answer_is_found_among_other_words():
    measured = answer_scores("The answer is A", ["A"])
    assert (measured["contains"], measured["recall"], measured["exact_match"]) == (1.0, 1.0, 0.0)


def test_answers_in_scripts_without_spaces_are_compared_by_characters():
    assert contain_answer(["法国的首都是巴黎。"], ["巴黎"])
    assert not contain_answer(["法国的首都是巴黎。"], ["黎巴"])
    measured = answer_scores("首都是巴黎。", ["巴黎"])
    assert measured["f1"] == pytest.approx(2 * 2 / (5 + 2))
    assert measured["contains"] == 1.0
    assert answer_scores("ปารีส", ["กรุงปารีส"])["precision"] == 1.0
    assert grounded_fraction("巴黎", ["法国的首都是巴黎。"]) == 1.0


def test_accents_distinguish_words():
    assert same_answer("AVÔ!", "avô")
    assert not same_answer("avô", "avó")


def test_a_text_contains_the_words_of_any_window():
    generator = random.Random(0)
    for _ in range(50):
        text = generator.choices(["a", "b", "ab"], k=7)
        part = generator.choices(["a", "b", "ab"], k=generator.randint(0, 3))
        num_windows = len(text) - len(part) + 1
        windows = [text[i : i + len(part)] for i in range(num_windows)]
        assert contains_words(text, part) == (bool(part) and part in windows), (text, part)


def test_grounded_is_the_fraction_of_words_in_any_passage():
    passages = ["Paris is a city.", "Lyon, too"]
    assert grounded_fraction("The city Lyon, or Rome", passages) == pytest.approx(2 / 4)
    assert grounded_fraction("Cit", passages) == 0
    assert math.isnan(grounded_fraction("the", passages))
    assert math.isnan(grounded_fraction("Lyon", []))
    assert contain_answer(passages, ["Rome", "LYON too"])
    assert not contain_answer(passages, ["city Lyon", "the"])


def random_rankings():
    """Yields 200 pairs of retrieved documents and gold documents."""
    generator = random.Random(0)
    for _ in range(200):
        documents = [f"d{i}" for i in range(14)]
        retrieved = generator.choices(documents, k=generator.randint(0, 16))  # some occur twice
        yield retrieved, generator.sample(documents, generator.randint(1, 6))


def without_duplicates(documents):
    unique = []
    for document in documents:
        if document not in unique:
            unique.append(document)
    return unique


def measures_loop(retrieved, gold, k):
    """Returns hit, recall, precision and nDCG at k."""
    num_gold, gain, best_gain = 0, 0.0, 0.0
    for rank, document in enumerate(without_duplicates(retrieved)):
        if rank < k and document in gold:
            num_gold += 1
            gain += 1 / math.log2(rank + 2)
    for rank in range(k):
        if rank < len(gold):
            best_gain += 1 / math.log2(rank + 2)
    ndcg = gain / best_gain
    return {"hit": min(num_gold, 1), "recall": num_gold / len(gold), "precision": num_gold / k, "ndcg": ndcg}


def test_retrieval_measures_equal_a_loop():
    for retrieved, gold in random_rankings():
        measured = retrieval_scores(retrieved, gold)
        for k in KS:
            for name, value in measures_loop(retrieved, gold, k).items():
                assert measured[f"{name}@{k}"] == pytest.approx(value)
        ranks = [rank for rank, document in enumerate(without_duplicates(retrieved), 1) if document in gold]
        assert measured["mrr"] == pytest.approx(1 / min(ranks) if ranks else 0)
        assert tuple(measured) == retrieval_names()


def test_retrieval_measures_equal_trec_eval():
    questions = {str(number): pair for number, pair in enumerate(random_rankings()) if pair[0]}  # no empty rankings
    relevant = {number: dict.fromkeys(gold, 1) for number, (_, gold) in questions.items()}
    rankings = {}
    for number, (retrieved, _) in questions.items():
        rankings[number] = {document: -rank for rank, document in enumerate(without_duplicates(retrieved))}
    cutoffs = ",".join(map(str, KS))
    trec_names = {"hit": "success", "recall": "recall", "precision": "P", "ndcg": "ndcg_cut"}
    measures = {"recip_rank", *(f"{name}.{cutoffs}" for name in trec_names.values())}
    expected = pytrec_eval.RelevanceEvaluator(relevant, measures).evaluate(rankings)
    assert len(expected) == len(questions) > 180
    for number, (retrieved, gold) in questions.items():
        measured = retrieval_scores(retrieved, gold)
        for name, trec_name in trec_names.items():
            for k in KS:
                value = expected[number][f"{trec_name}_{k}"]
                assert measured[f"{name}@{k}"] == pytest.approx(value)
        assert measured["mrr"] == pytest.approx(expected[number]["recip_rank"])


def test_scores_of_three_of_four_gold_documents_at_ranks_1_3_and_6():
    scores = retrieval_scores(["a", "x", "b", "y", "z", "c"], ["a", "b", "c", "d"])
    best_gain = 1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)
    assert scores["ndcg@5"] == pytest.approx((1 + 1 / 2) / best_gain)
    assert scores["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(7)) / best_gain)
    expected = {"recall@5": 0.5, "precision@5": 0.4, "precision@10": 0.3, "hit@1": 1, "mrr": 1}
    assert {name: scores[name] for name in expected} == expected


def test_scores_of_several_questions_are_means_with_intervals():
    scores, values = RetrievalScores([5]), []
    for retrieved, gold in random_rankings():
        scores.add(retrieved, gold)
        values.append(measures_loop(retrieved, gold, 5)["recall"])
    assert len(scores) == 200
    assert scores.means()["recall@5"] == pytest.approx(np.mean(values))
    assert scores.intervals()["recall@5"] == pytest.approx(bootstrap(values))
    assert set(scores.means()) == set(retrieval_names([5]))
    assert RetrievalScores().means() == RetrievalScores().intervals() == {}


def test_a_question_without_gold_documents_is_rejected():
    with pytest.raises(ValueError, match="a question has none; leave it out"):
        retrieval_scores(["a"], [])
