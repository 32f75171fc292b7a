"""Metrics of texts against the implementations that papers quote, and against loops."""

import math
import random
from collections import Counter

import pytest
import tiny
import torch
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import bert_score, sacre_bleu_score

from lightning_softprompt.evaluation.metrics.bert_score import bert_scores, encoder
from lightning_softprompt.evaluation.metrics.sentences import lead, sentences
from lightning_softprompt.evaluation.metrics.text import (
    bleu,
    bootstrap_corpus,
    chrf,
    nist,
    novel_bigrams,
    repetition,
    rouge,
)

WORDS = """
    The the cat's cats sat, running runs on mats (2.5%) résumé U.S. mother-in-law; jumped quickly happiness 1,000 . !
    Über
""".split()  # noqa: SIM905
CATS = ("a", "cat", "sat", "on", "the", "mat", "and", "ran", "off", "with", "two", "dogs")
CPU = torch.device("cpu")


def drawn(rows, most_references=1, shortest=0, seed=0):
    """Answers and their references, alike in part."""
    generator = random.Random(seed)

    def text():
        return " ".join(generator.choices(WORDS, k=generator.randint(shortest, 25)))

    right = [[text() for _ in range(generator.randint(1, most_references))] for _ in range(rows)]
    said = [" ".join(w for w in row[0].split() if generator.random() < 0.7) + " " + text()[:30] for row in right]
    return [text.strip() for text in said], right


def grams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def clipped(said, row, n):
    """How many n-grams are right, each as often as one reference has it."""
    found = 0
    for gram, count in Counter(grams(said, n)).items():
        found += min(count, max(grams(reference, n).count(gram) for reference in row))
    return found


@pytest.mark.parametrize("stem", [True, False])
def test_rouge_is_that_of_rouge_score(stem):
    names = ["rouge1", "rouge2", "rouge3", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=stem)
    said, right = drawn(60, most_references=4)
    assert any(not text for row in right for text in row)
    for text, row in zip(["", "...", *said], [["a cat"], ["a cat"], *right], strict=True):
        expected = {name: score.fmeasure for name, score in scorer.score_multi(row, text).items()}
        assert rouge(text, row, names, stem) == pytest.approx(expected, abs=1e-6)


def test_stems_make_a_difference():
    assert rouge("jumping houses", ["jumps house"], ["rouge1"], stem=True) == {"rouge1": 1.0}
    assert rouge("jumping houses", ["jumps house"], ["rouge1"], stem=False) == {"rouge1": 0.0}


def test_the_best_reference_counts():
    assert rouge("a b", ["c d", "a b", "a c"], ["rouge1", "rougeL"]) == {"rouge1": 1.0, "rougeL": 1.0}


def bleu_loop(said, right):
    """Of texts in which spaces part all tokens. What no n-gram matches counts a half, then a quarter, ..."""
    logs, halves = 0.0, 0
    for n in range(1, 5):
        hits = sum(clipped(text, row, n) for text, row in zip(said, right, strict=True))
        total = sum(max(0, len(text) - n + 1) for text in said)
        if not hits:
            halves += 1
        logs += math.log((hits or 0.5**halves) / total) / 4
    nearest = sum(
        min((abs(len(reference) - len(text)), len(reference)) for reference in row)[1]
        for text, row in zip(said, right, strict=True)
    )
    length = sum(map(len, said))
    return math.exp(logs + min(0, 1 - nearest / length))


@pytest.mark.parametrize("seed", range(4))
def test_bleu_is_what_a_loop_gives(seed):
    words, generator = CATS[:9], random.Random(seed)
    right = [
        [generator.choices(words, k=generator.randint(5, 14)) for _ in range(generator.randint(1, 3))] for _ in range(8)
    ]
    said = [generator.choices(words, k=generator.randint(4, 12)) if seed else row[-1][:-1] for row in right]
    texts, references = [" ".join(t) for t in said], [[" ".join(r) for r in row] for row in right]
    assert bleu(texts, references) == pytest.approx(bleu_loop(said, right), rel=1e-9)


def test_bleu_without_a_match_of_four_words_is_smoothed():
    said, right = "the cat sat there now", "the cat sat on a mat"
    assert clipped(said.split(), [right.split()], 4) == 0
    assert bleu([said], [[right]]) == pytest.approx(bleu_loop([said.split()], [[right.split()]]))
    assert sacre_bleu_score([said], [[right]]) == 0  # what is not wanted here


def test_bleu_parts_texts_as_sacrebleu_does():
    said, right = drawn(40, shortest=6)
    assert bleu(said, right) == pytest.approx(float(sacre_bleu_score(said, right, tokenize="13a")), abs=1e-6)


def chrf_loop(said, right):
    """The F score of each length over all rows, each with the reference that is best for it alone."""

    def counts(text, reference):
        a, b = ("".join(t.split()) for t in (text, reference))
        return [(sum((Counter(grams(a, n)) & Counter(grams(b, n))).values()), len(grams(a, n)), len(grams(b, n)))
                for n in range(1, 7)]  # fmt: skip

    def score(table):
        parts = [(hits / a, hits / b) for hits, a, b in table if a and b]
        if not parts:
            return 0.0
        p, r = (sum(x) / len(parts) for x in zip(*parts, strict=True))
        return 5 * p * r / (4 * p + r) if p + r else 0.0

    total = [(0, 0, 0)] * 6
    for text, row in zip(said, right, strict=True):
        best = max((counts(text, reference) for reference in row), key=score)
        total = [tuple(x + y for x, y in zip(a, b, strict=True)) for a, b in zip(total, best, strict=True)]
    return score(total)


@pytest.mark.parametrize("references", [1, 3])
def test_chrf_is_what_a_loop_gives(references):
    said, right = drawn(40, most_references=references, shortest=6)
    assert chrf(said, right) == pytest.approx(chrf_loop(said, right), rel=1e-9)


def simple(rows, most_references, seed):
    generator = random.Random(seed)

    def text():
        return generator.choices(CATS, k=generator.randint(6, 15))

    right = [[text() for _ in range(generator.randint(1, most_references))] for _ in range(rows)]
    return [row[0][: generator.randint(3, 15)] + text()[:3] for row in right], right


@pytest.mark.parametrize("seed", range(3))
def test_nist_is_that_of_nltk_where_there_is_one_reference(seed):
    said, right = simple(20, 1, seed)
    texts, references = [" ".join(t).upper() for t in said], [[" ".join(r) for r in row] for row in right]
    assert nist(texts, references) == pytest.approx(corpus_nist(right, said), rel=1e-9)


def test_nist_counts_what_stands_in_any_reference():
    said, right = simple(20, 4, 7)
    told = [reference for row in right for reference in row]
    total = 0.0
    for n in range(1, 6):
        gained = 0.0
        for text, row in zip(said, right, strict=True):
            for gram in set(grams(text, n)):
                hits = min(text_count(text, gram), max(text_count(reference, gram) for reference in row))
                before = sum(map(len, told)) if n == 1 else sum(text_count(r, gram[:-1]) for r in told)
                gained += hits and hits * math.log2(before / sum(text_count(r, gram) for r in told))
        total += gained / sum(len(grams(text, n)) for text in said)
    ratio = sum(map(len, said)) / sum(sum(map(len, row)) / len(row) for row in right)
    beta = math.log(0.5) / math.log(1.5) ** 2
    expected = total * math.exp(beta * math.log(min(1, ratio)) ** 2)
    texts, references = [" ".join(t) for t in said], [[" ".join(r) for r in row] for row in right]
    assert nist(texts, references) == pytest.approx(expected, rel=1e-9)
    shorter = [text[:2] for text in said]
    assert 0 < nist([" ".join(t) for t in shorter], references) < 0.2 * expected


def text_count(text, gram):
    return grams(text, len(gram)).count(gram)


def test_two_thirds_of_the_length_are_worth_half():
    right = [["a b c d e f"]]
    assert nist(["a b c d"], right) == pytest.approx(0.5 * math.log2(6))


@pytest.mark.parametrize("metric", [bleu, chrf, nist])
def test_nothing_said_scores_nothing(metric):
    assert metric(["", ""], [["a cat"], ["a dog", "two dogs"]]) == 0
    assert metric(["a cat"], [[""]]) == 0


def test_novel_bigrams_and_repetition_are_what_a_loop_gives():
    generator = random.Random(0)
    for _ in range(50):
        said, source = (generator.choices("abcd", k=generator.randint(2, 20)) for _ in range(2))
        known = {(source[i], source[i + 1]) for i in range(len(source) - 1)}
        new = [(said[i], said[i + 1]) not in known for i in range(len(said) - 1)]
        assert novel_bigrams(" ".join(said), ", ".join(source).upper()) == pytest.approx(sum(new) / len(new))
        n, seen, again = 4 if len(said) >= 8 else 2, [], 0
        for i in range(len(said) - n + 1):
            again += said[i : i + n] in seen
            seen.append(said[i : i + n])
        assert repetition(" ".join(said)) == pytest.approx(again / len(seen))
    assert math.isnan(novel_bigrams("one", "one two"))
    assert repetition("") == repetition("one") == 0


@pytest.fixture
def bert(tiny_folder):
    return str(tiny_folder("bert"))


SAID = ("a warm and funny film", "dull", "", "it is a dog", "the film is good , the dog is sad")
RIGHT = (("a funny film", "a warm story"), ("dull",), ("a dog",), ("", "this film was good"), ("a sad dog",))


def test_bert_score_is_greedy_matching(bert):
    model, tokenizer = encoder(bert).model.base_model, encoder(bert).codec.tokenizer

    def states(text):
        ids = tokenizer(text, return_tensors="pt").input_ids  # <s> ... </s>
        return model(input_ids=ids).last_hidden_state[0, 1:-1].detach()

    def f1(a, b):
        if not len(a) or not len(b):
            return 0.0
        precision = sum(max(float(torch.cosine_similarity(x, y, dim=0)) for y in b) for x in a) / len(a)
        recall = sum(max(float(torch.cosine_similarity(x, y, dim=0)) for x in a) for y in b) / len(b)
        return 2 * precision * recall / (precision + recall)

    expected = [max(f1(states(s), states(r)) for r in row) for s, row in zip(SAID, RIGHT, strict=True)]
    assert bert_scores(SAID, RIGHT, bert, CPU) == pytest.approx(expected, abs=1e-5)
    assert expected[1] == pytest.approx(1)


def test_bert_score_is_that_of_torchmetrics(bert):
    texts, right = ["a warm film", "a dog is good"], ["a funny film", "this dog was very good"]
    backbone = encoder(bert)

    class Tokenizer:
        cls_token_id, sep_token_id, pad_token_id = tiny.BOS, tiny.EOS, tiny.PAD

        def __call__(self, texts, **_):
            return backbone.codec.tokenizer(
                list(texts), padding="max_length", max_length=12, truncation=True, return_tensors="pt"
            )

    found = bert_score(
        texts, right, model=backbone.model.base_model, user_tokenizer=Tokenizer(), max_length=12, num_layers=2,
        user_forward_fn=lambda model, batch: model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state,
    )  # fmt: skip
    assert bert_scores(texts, [[r] for r in right], bert, CPU) == pytest.approx(found["f1"].tolist(), abs=1e-5)


def test_bert_score_leaves_the_random_state_and_requires_an_encoder(tiny_folder):
    encoder.cache_clear()
    state = torch.get_rng_state()
    bert_scores(["a dog"], [["a film"]], str(tiny_folder("bert")), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"requires an encoder such as all-minilm-l6-v2, but .* is a decoder"):
        bert_scores(["a dog"], [["a film"]], str(tiny_folder("llama")), CPU)


@pytest.mark.slow
def test_bert_score_knows_what_means_the_same():
    near, far, same = bert_scores(
        ["The cat slept on the sofa."] * 3,
        [["A kitten was sleeping on the couch."], ["Shares fell by two per cent."], ["The cat slept on the sofa."]],
        "all-minilm-l6-v2",
        CPU,
    )
    assert far < 0.45 < near < same == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. A. Smith paid $3.50. He left.", ["Dr. A. Smith paid $3.50.", "He left."]),
        ("In the U.S. Army they march. 20 men fell.", ["In the U.S. Army they march.", "20 men fell."]),
        ("He said “no.” “Why?” she asked. (So.) It", ["He said “no.”", "“Why?” she asked.", "(So.)", "It"]),
        ("a heading\n\n  A sentence.\n", ["a heading", "A sentence."]),
        ("一。二！三", ["一。", "二！", "三"]),  # noqa: RUF001
        ("wait ... what", ["wait ... what"]),
        ("It is no. Rates fell.", ["It is no.", "Rates fell."]),
        ("He takes vitamin C. It helps.", ["He takes vitamin C.", "It helps."]),
        ("See no. 5 here. So.", ["See no. 5 here.", "So."]),
        (" \n ", []),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert sentences(text) == expected
    assert lead(text, 2) == " ".join(expected[:2])


def test_the_interval_of_a_split_is_that_of_its_resamplings():
    said = [" ".join(random.Random(i).choices(CATS, k=8)) for i in range(40)]
    right = [[" ".join(random.Random(i // 2).choices(CATS, k=8))] for i in range(40)]
    draw = random.Random(0)
    samples = [[draw.randrange(40) for _ in range(40)] for _ in range(400)]
    for name, metric in (("bleu", bleu), ("chrf", chrf)):
        scores = sorted(metric([said[i] for i in rows], [right[i] for i in rows]) for rows in samples)
        low, high = bootstrap_corpus(name, said, right)
        width = scores[-11] - scores[10]
        assert low == pytest.approx(scores[10], abs=0.2 * width)
        assert high == pytest.approx(scores[-11], abs=0.2 * width)
        assert low < metric(said, right) < high
