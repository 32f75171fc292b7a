"""Scores of searches, fusion and cross-encoders compared with their formulas, written as loops."""

import math
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Document, Passage
from lightning_softprompt.retrieval.passages.words import words
from lightning_softprompt.retrieval.reranker import CrossEncoder, rerank
from lightning_softprompt.retrieval.search.encoder import SentenceEncoder
from lightning_softprompt.retrieval.search.fusion import Ranking, ReciprocalRank, WeightedScores, top_k
from lightning_softprompt.retrieval.search.settings import IndexSettings

TEXTS = [
    "a warm and funny film about a dog",
    "the dog , the dog ! that dog",
    "a sad story that never ends well",
    "good film . great film",
    "wonderful",
]


def make_documents(texts=TEXTS):
    return [Document(f"d{number}", "", text) for number, text in enumerate(texts)]


def bm25(question, texts, k1, b):
    """Returns the score of each text by the formula of Robertson et al. (Lucene's variant of the idf)."""
    bags = [Counter(words(text, "english")) for text in texts]
    mean_length = sum(bag.total() for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        length_ratio = bag.total() / mean_length
        score = 0.0
        for word in words(question, "english"):
            df = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            saturation = k1 * (1 - b + b * length_ratio)
            score += idf * bag[word] / (bag[word] + saturation)
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (2.0, 1.0)])
def test_bm25_equals_its_formula(tmp_path, k1, b):
    build_index(tmp_path / "index", make_documents(), IndexSettings(encoder=None, k1=k1, b=b))
    index = Index(tmp_path / "index")
    for question in ("funny dogs", "dog dog film", "a film that ends", "the great unknown"):
        scores = bm25(question, TEXTS, k1, b)
        results = index.lexical([question], 10)[0]
        matching = [row for row, score in enumerate(scores) if score > 0]
        expected = sorted(matching, key=lambda row: (-scores[row], row))
        assert results.rows.tolist() == expected
        np.testing.assert_allclose(results.scores, [scores[row] for row in expected], rtol=1e-5)
    assert not len(index.lexical(["unheard words"], 3)[0])


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_vectors_are_pooled_states_of_length_one(tiny_folder, tmp_path, pool):
    folder = tmp_path / "encoder"
    folder.symlink_to(tiny_folder("bert"))
    if pool == "cls":
        folder = shutil.copytree(tiny_folder("bert"), tmp_path / "cls")
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    encoder = SentenceEncoder(str(folder), device="cpu")
    vectors = encoder.passages(TEXTS)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    for text, vector in zip(TEXTS, vectors, strict=True):  # single texts have no padding
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = states.mean(0) if pool == "mean" else states[0]
        np.testing.assert_allclose(vector, (pooled / pooled.norm()).detach().numpy(), atol=1e-6)


def test_prompts_in_the_files_of_an_encoder_precede_texts(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("bert"), tmp_path / "encoder")
    plain = SentenceEncoder(str(folder), device="cpu")
    file = folder / "config_sentence_transformers.json"
    file.write_text('{"prompts": {"query": "what is ", "document": "story : "}}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    encoder = SentenceEncoder(str(folder), device="cpu")
    assert encoder.window == 5
    plain.window = 5
    np.testing.assert_array_equal(encoder.questions(["a dog"]), plain.questions(["what is a dog"]))
    np.testing.assert_array_equal(encoder.passages(["a dog"]), plain.passages(["story : a dog"]))


def test_an_encoder_with_unknown_pooling_is_rejected(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("bert"), tmp_path / "encoder")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(ValueError, match="pools by pooling_mode_weightedmean_tokens; known are"):
        SentenceEncoder(str(folder))


def dot_product(vector, other):
    return math.fsum(float(a) * float(b) for a, b in zip(vector, other, strict=True))


@pytest.mark.parametrize("store", ["flat", "ivf", "hnsw"])
def test_dense_search_finds_the_largest_products(tiny_folder, tmp_path, store):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(tiny.WORDS, k=6)) for _ in range(150)]
    name = str(tiny_folder("bert"))
    build_index(tmp_path / "index", make_documents(texts), IndexSettings(encoder=name, store=store))
    index = Index(tmp_path / "index")
    assert len(index) == 150
    encoder = SentenceEncoder(name, device="cpu")
    short_texts = [" ".join(rng.choices(tiny.WORDS, k=4)) for _ in range(5)]
    questions = texts[:5] + short_texts
    vectors, question_vectors = encoder.passages(texts), encoder.questions(questions)
    for results, question in zip(index.dense(questions, 7), question_vectors, strict=True):
        products = [dot_product(vector, question) for vector in vectors]
        np.testing.assert_allclose(results.scores, sorted(products, reverse=True)[:7], atol=1e-5)
        np.testing.assert_allclose(results.scores, [products[row] for row in results.rows], atol=1e-5)


def make_ranking(scores):
    """Returns the ranking of a dictionary of scores by row, the best first."""
    return Ranking(np.array(list(scores), np.int64), np.array(list(scores.values()), np.float32))


LEXICAL = make_ranking({3: 9.0, 1: 5.0, 7: 1.0})
DENSE = make_ranking({1: 0.9, 2: 0.7, 3: 0.65, 9: 0.5})


def test_reciprocal_rank_fusion_equals_its_formula():
    expected = {}
    for weight, ranked in ((0.3, [3, 1, 7]), (0.7, [1, 2, 3, 9])):
        for rank, row in enumerate(ranked, start=1):
            expected[row] = expected.get(row, 0) + weight / (20 + rank)
    results = ReciprocalRank(offset=20, dense=0.7)(LEXICAL, DENSE, 4)
    assert results.rows.tolist() == sorted(expected, key=expected.get, reverse=True)[:4]
    np.testing.assert_allclose(results.scores, sorted(expected.values(), reverse=True)[:4], rtol=1e-6)


def test_weighted_scores_equal_their_formula():
    lexical = {3: 1, 1: 0.5, 7: 0}  # scaled to 0 ... 1
    dense = {1: 1, 2: 0.5, 3: 0.375, 9: 0}
    expected = {}
    for row in (1, 2, 3, 7, 9):
        expected[row] = 0.6 * lexical.get(row, 0) + 0.4 * dense.get(row, 0)
    results = WeightedScores(dense=0.4)(LEXICAL, DENSE, 10)
    assert results.rows.tolist() == sorted(expected, key=lambda row: (-expected[row], row))
    np.testing.assert_allclose(results.scores, sorted(expected.values(), reverse=True), atol=1e-6)


@pytest.mark.parametrize("fusion", [ReciprocalRank(), WeightedScores()])
def test_rankings_can_be_empty(fusion):
    empty = make_ranking({})
    assert fusion(empty, DENSE, 2).rows.tolist() == [1, 2]
    assert fusion(LEXICAL, empty, 2).rows.tolist() == [3, 1]
    assert not len(fusion(empty, empty, 2))


@pytest.mark.parametrize("fusion", [ReciprocalRank, WeightedScores])
def test_the_weight_of_dense_scores_must_be_between_0_and_1(fusion):
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        fusion(dense=1.5)


def test_ties_are_ranked_by_row_for_every_k():
    rng = np.random.default_rng(0)
    rows = rng.permutation(200)
    scores = rng.integers(0, 5, 200).astype(np.float32)
    score_by_row = dict(zip(rows.tolist(), scores.tolist(), strict=True))
    expected = sorted(score_by_row, key=lambda row: (-score_by_row[row], row))
    for k in (1, 7, 50, 200, 300):
        assert top_k(rows, scores, k).rows.tolist() == expected[:k]


def make_passage(row, text):
    title = "story" if row % 2 else ""
    return Passage(f"d{row}", title, text, "", 0, len(text))


def test_a_cross_encoder_sorts_passages_by_its_scores(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=tiny.V, max_position_embeddings=48, num_labels=1, initializer_range=0.5, **sizes)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer("bert")
    tokenizer.save_pretrained(tmp_path)
    passages = [make_passage(row, text) for row, text in enumerate(TEXTS * 8)]
    cross_encoder = CrossEncoder(str(tmp_path), device="cpu")
    expected = []
    for passage in passages:
        with torch.inference_mode():
            expected.append(float(model(**tokenizer("what dog ?", passage.searched, return_tensors="pt")).logits))
    np.testing.assert_allclose(cross_encoder.scores("what dog ?", passages), expected, atol=1e-5)
    ranking = make_ranking({4: 3.0, 2: 2.0, 0: 1.0})
    results = rerank(cross_encoder, ["what dog ?"], [ranking], passages, 2)[0]
    assert results.rows.tolist() == sorted([4, 2, 0], key=lambda row: -expected[row])[:2]


def test_a_cross_encoder_with_several_classes_is_rejected(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertForSequenceClassification(BertConfig(vocab_size=tiny.V, num_labels=3, **sizes)).save_pretrained(tmp_path)
    tiny.tokenizer("bert").save_pretrained(tmp_path)
    passages = [make_passage(0, "a dog")]
    with pytest.raises(ValueError, match="has 3 classes; a cross-encoder requires one"):
        CrossEncoder(str(tmp_path)).scores("a", passages)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*Set name to a folder"):
        CrossEncoder(str(tmp_path / "none")).scores("a", passages)
