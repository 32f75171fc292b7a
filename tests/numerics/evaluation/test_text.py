"""Metrics of texts compared with reference implementations and with loops."""

import itertools
import math
import random
from collections import Counter

import pytest
import tiny
import torch
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import bert_score, sacre_bleu_score

from lightning_softprompt.core.sentences import lead, sentences
from lightning_softprompt.evaluation.metrics.bert_score import bert_scores, encoder
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


def random_texts(rows, max_references=1, min_words=0, seed=0):
    """Returns random predictions and their references, which are similar in part."""
    generator = random.Random(seed)

    def make_text():
        return " ".join(generator.choices(WORDS, k=generator.randint(min_words, 25)))

    references = [[make_text() for _ in range(generator.randint(1, max_references))] for _ in range(rows)]
    predictions = []
    for row in references:
        some_words = [word for word in row[0].split() if generator.random() < 0.7]
        predictions.append(f"{' '.join(some_words)} {make_text()[:30]}".strip())
    return predictions, references


def ngrams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def join_words(texts):
    return [" ".join(words) for words in texts]


def clipped_matches(prediction, references, n):
    """Counts matching n-grams, each at most as often as in one reference."""
    matches = 0
    for gram, count in Counter(ngrams(prediction, n)).items():
        matches += min(count, max(ngrams(reference, n).count(gram) for reference in references))
    return matches


@pytest.mark.parametrize("stem", [True, False])
def test_rouge_equals_rouge_score(stem):
    names = ["rouge1", "rouge2", "rouge3", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=stem)
    predictions, references = random_texts(60, max_references=4)
    assert any(not text for row in references for text in row)
    cases = [("", ["a cat"]), ("...", ["a cat"]), *zip(predictions, references, strict=True)]
    for text, row in cases:
        expected = {name: score.fmeasure for name, score in scorer.score_multi(row, text).items()}
        assert rouge(text, row, names, stem) == pytest.approx(expected, abs=1e-6)


def test_stems_make_a_difference():
    assert rouge("jumping houses", ["jumps house"], ["rouge1"], stem=True) == {"rouge1": 1.0}
    assert rouge("jumping houses", ["jumps house"], ["rouge1"], stem=False) == {"rouge1": 0.0}


def test_the_best_reference_counts():
    assert rouge("a b", ["c d", "a b", "a c"], ["rouge1", "rougeL"]) == {"rouge1": 1.0, "rougeL": 1.0}


def closest_length(prediction, references):
    """Returns the length of the reference whose length is closest, the shorter of two."""
    lengths = [len(reference) for reference in references]
    return min(lengths, key=lambda length: (abs(length - len(prediction)), length))


def bleu_loop(predictions, references):
    """BLEU of token lists. The first n without a match counts half a match, the next a quarter, ..."""
    rows = list(zip(predictions, references, strict=True))
    logs, num_smoothed = 0.0, 0
    for n in range(1, 5):
        matches = sum(clipped_matches(text, row, n) for text, row in rows)
        total = sum(max(0, len(text) - n + 1) for text in predictions)
        if not matches:
            num_smoothed += 1
        logs += math.log((matches or 0.5**num_smoothed) / total) / 4
    reference_length = sum(closest_length(text, row) for text, row in rows)
    length = sum(map(len, predictions))
    return math.exp(logs + min(0, 1 - reference_length / length))


@pytest.mark.parametrize("seed", range(4))
def test_bleu_equals_a_loop(seed):
    words, generator = CATS[:9], random.Random(seed)
    references = []
    for _ in range(8):
        count = generator.randint(1, 3)
        references.append([generator.choices(words, k=generator.randint(5, 14)) for _ in range(count)])
    if seed:
        predictions = [generator.choices(words, k=generator.randint(4, 12)) for _ in references]
    else:
        predictions = [row[-1][:-1] for row in references]
    expected = bleu_loop(predictions, references)
    assert bleu(join_words(predictions), [join_words(row) for row in references]) == pytest.approx(expected, rel=1e-9)


def test_bleu_without_a_match_of_four_words_is_smoothed():
    prediction, reference = "the cat sat there now", "the cat sat on a mat"
    assert clipped_matches(prediction.split(), [reference.split()], 4) == 0
    expected = bleu_loop([prediction.split()], [[reference.split()]])
    assert bleu([prediction], [[reference]]) == pytest.approx(expected)
    assert sacre_bleu_score([prediction], [[reference]]) == 0  # sacreBLEU does not smooth here


def test_bleu_tokenizes_as_sacrebleu_does():
    predictions, references = random_texts(40, min_words=6)
    expected = float(sacre_bleu_score(predictions, references, tokenize="13a"))
    assert bleu(predictions, references) == pytest.approx(expected, abs=1e-6)


def chrf_counts(text, reference):
    """Returns matches and numbers of character n-grams for n = 1 ... 6, without spaces."""
    a, b = "".join(text.split()), "".join(reference.split())
    counts = []
    for n in range(1, 7):
        in_text, in_reference = Counter(ngrams(a, n)), Counter(ngrams(b, n))
        counts.append(((in_text & in_reference).total(), in_text.total(), in_reference.total()))
    return counts


def chrf_score(counts):
    shares = [(matches / a, matches / b) for matches, a, b in counts if a and b]
    if not shares:
        return 0.0
    precision, recall = (sum(share) / len(shares) for share in zip(*shares, strict=True))
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def chrf_loop(predictions, references):
    """The F score of the counts over all rows, each with its best reference."""
    total = torch.zeros(6, 3, dtype=torch.double)
    for text, row in zip(predictions, references, strict=True):
        best = max((chrf_counts(text, reference) for reference in row), key=chrf_score)
        total += torch.tensor(best)
    return chrf_score(total.tolist())


@pytest.mark.parametrize("count", [1, 3])
def test_chrf_equals_a_loop(count):
    predictions, references = random_texts(40, max_references=count, min_words=6)
    assert chrf(predictions, references) == pytest.approx(chrf_loop(predictions, references), rel=1e-9)


def random_words(rows, max_references, seed):
    """Returns random token lists of known words and their references."""
    generator = random.Random(seed)

    def make_words():
        return generator.choices(CATS, k=generator.randint(6, 15))

    references = [[make_words() for _ in range(generator.randint(1, max_references))] for _ in range(rows)]
    predictions = []
    for row in references:
        first_words = row[0][: generator.randint(3, 15)]
        predictions.append(first_words + make_words()[:3])
    return predictions, references


@pytest.mark.parametrize("seed", range(3))
def test_nist_with_one_reference_equals_nltk(seed):
    predictions, references = random_words(20, 1, seed)
    texts = [text.upper() for text in join_words(predictions)]
    expected = corpus_nist(references, predictions)
    assert nist(texts, [join_words(row) for row in references]) == pytest.approx(expected, rel=1e-9)


def count_ngram(text, gram):
    return ngrams(text, len(gram)).count(gram)


def information(gram, references):
    """Returns the information of an n-gram: log2 of the count of its first n - 1 words over its own count."""
    if len(gram) == 1:
        count_before = sum(map(len, references))
    else:
        count_before = sum(count_ngram(reference, gram[:-1]) for reference in references)
    return math.log2(count_before / sum(count_ngram(reference, gram) for reference in references))


def test_nist_counts_ngrams_of_any_reference():
    predictions, references = random_words(20, 4, 7)
    all_references = [reference for row in references for reference in row]
    total = 0.0
    for n in range(1, 6):
        gain = 0.0
        for text, row in zip(predictions, references, strict=True):
            for gram in set(ngrams(text, n)):
                in_references = max(count_ngram(reference, gram) for reference in row)
                matches = min(count_ngram(text, gram), in_references)
                gain += matches and matches * information(gram, all_references)
        total += gain / sum(len(ngrams(text, n)) for text in predictions)
    mean_lengths = [sum(map(len, row)) / len(row) for row in references]
    ratio = sum(map(len, predictions)) / sum(mean_lengths)
    beta = math.log(0.5) / math.log(1.5) ** 2
    expected = total * math.exp(beta * math.log(min(1, ratio)) ** 2)
    reference_texts = [join_words(row) for row in references]
    assert nist(join_words(predictions), reference_texts) == pytest.approx(expected, rel=1e-9)
    shorter = [text[:2] for text in predictions]
    assert 0 < nist(join_words(shorter), reference_texts) < 0.2 * expected


def test_two_thirds_of_the_length_are_worth_half():
    references = [["a b c d e f"]]
    assert nist(["a b c d"], references) == pytest.approx(0.5 * math.log2(6))


@pytest.mark.parametrize("metric", [bleu, chrf, nist])
def test_an_empty_prediction_or_reference_scores_zero(metric):
    assert metric(["", ""], [["a cat"], ["a dog", "two dogs"]]) == 0
    assert metric(["a cat"], [[""]]) == 0


def test_novel_bigrams_and_repetition_equal_a_loop():
    generator = random.Random(0)
    for _ in range(50):
        text, source = (generator.choices("abcd", k=generator.randint(2, 20)) for _ in range(2))
        of_source = set(itertools.pairwise(source))
        is_novel = [bigram not in of_source for bigram in itertools.pairwise(text)]
        expected = sum(is_novel) / len(is_novel)
        assert novel_bigrams(" ".join(text), ", ".join(source).upper()) == pytest.approx(expected)
        n, previous, num_repeated = 4 if len(text) >= 8 else 2, [], 0
        for i in range(len(text) - n + 1):
            num_repeated += text[i : i + n] in previous
            previous.append(text[i : i + n])
        assert repetition(" ".join(text)) == pytest.approx(num_repeated / len(previous))
    assert math.isnan(novel_bigrams("one", "one two"))
    assert repetition("") == repetition("one") == 0


@pytest.fixture
def bert(tiny_folder):
    return str(tiny_folder("bert"))


PREDICTIONS = ("a warm and funny film", "dull", "", "it is a dog", "the film is good , the dog is sad")
REFERENCES = (("a funny film", "a warm story"), ("dull",), ("a dog",), ("", "this film was good"), ("a sad dog",))


def test_bert_score_is_greedy_matching(bert):
    model, tokenizer = encoder(bert).model.base_model, encoder(bert).codec.tokenizer

    def states(text):
        ids = tokenizer(text, return_tensors="pt").input_ids  # <s> ... </s>
        return model(input_ids=ids).last_hidden_state[0, 1:-1].detach()

    def best_match(state, others):
        return max(float(torch.cosine_similarity(state, other, dim=0)) for other in others)

    def f1(a, b):
        if not len(a) or not len(b):
            return 0.0
        precision = sum(best_match(x, b) for x in a) / len(a)
        recall = sum(best_match(y, a) for y in b) / len(b)
        return 2 * precision * recall / (precision + recall)

    expected = []
    for text, row in zip(PREDICTIONS, REFERENCES, strict=True):
        expected.append(max(f1(states(text), states(reference)) for reference in row))
    assert bert_scores(PREDICTIONS, REFERENCES, bert, CPU) == pytest.approx(expected, abs=1e-5)
    assert expected[1] == pytest.approx(1)


def test_bert_score_equals_torchmetrics(bert):
    texts, references = ["a warm film", "a dog is good"], ["a funny film", "this dog was very good"]
    backbone = encoder(bert)

    class Tokenizer:
        cls_token_id, sep_token_id, pad_token_id = tiny.BOS, tiny.EOS, tiny.PAD

        def __call__(self, texts, **_):
            return backbone.codec.tokenizer(
                list(texts), padding="max_length", max_length=12, truncation=True, return_tensors="pt"
            )

    expected = bert_score(
        texts, references, model=backbone.model.base_model, user_tokenizer=Tokenizer(), max_length=12, num_layers=2,
        user_forward_fn=lambda model, batch: model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state,
    )  # fmt: skip
    scores = bert_scores(texts, [[reference] for reference in references], bert, CPU)
    assert scores == pytest.approx(expected["f1"].tolist(), abs=1e-5)


def test_bert_score_draws_no_random_numbers_and_requires_an_encoder(tiny_folder):
    encoder.cache_clear()
    state = torch.get_rng_state()
    bert_scores(["a dog"], [["a film"]], str(tiny_folder("bert")), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"requires an encoder such as all-minilm-l6-v2, but .* is a decoder"):
        bert_scores(["a dog"], [["a film"]], str(tiny_folder("llama")), CPU)


@pytest.mark.slow
def test_bert_score_recognizes_the_same_meaning():
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


def select(items, rows):
    return [items[row] for row in rows]


def test_the_interval_of_a_split_equals_the_one_of_its_resamplings():
    def make_text(seed):
        return " ".join(random.Random(seed).choices(CATS, k=8))

    predictions = [make_text(i) for i in range(40)]
    references = [[make_text(i // 2)] for i in range(40)]
    generator = random.Random(0)
    samples = [[generator.randrange(40) for _ in range(40)] for _ in range(400)]
    for name, metric in (("bleu", bleu), ("chrf", chrf)):
        scores = sorted(metric(select(predictions, rows), select(references, rows)) for rows in samples)
        low, high = bootstrap_corpus(name, predictions, references)
        width = scores[-11] - scores[10]
        assert low == pytest.approx(scores[10], abs=0.2 * width)
        assert high == pytest.approx(scores[-11], abs=0.2 * width)
        assert low < metric(predictions, references) < high
