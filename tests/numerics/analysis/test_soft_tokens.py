"""Geometry and nearest words of soft tokens, against direct computations."""

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from lightning_softprompt.analysis.soft_tokens import (
    effective_rank,
    find_nearest_words,
    measure_drift,
    project_to_words,
    redundant_pairs,
    token_cosines,
)
from lightning_softprompt.methods import DPT

FAMILIES = ("llama", "bert", "t5")


def test_the_nearest_word_of_a_word_is_the_word(backbone):
    ids = torch.tensor([7, 11, 9])
    embeddings = backbone.embed(ids[None])[0]
    for token, word in zip(find_nearest_words(backbone, 3 * embeddings, count=2), ids.tolist(), strict=True):
        assert token.by_cosine[0].id == word
        assert token.by_cosine[0].value == pytest.approx(1, abs=1e-6)
    nearest = find_nearest_words(backbone, embeddings, count=1)
    assert [token.by_distance[0].id for token in nearest] == ids.tolist()
    assert_close(project_to_words(backbone, 3 * embeddings), embeddings)


def test_values_are_those_of_a_loop_over_the_vocabulary(backbone):
    tokens, size = torch.randn(2, backbone.hidden_size), len(backbone.codec.tokenizer)
    words = [backbone.embed(torch.tensor([[word]]))[0, 0] for word in range(size)]
    mean_norm = sum(float(word.norm()) for word in words) / size
    for token, result in zip(tokens, find_nearest_words(backbone, tokens, count=4), strict=True):
        cosines = {word: float(cosine_similarity(token, words[word], dim=0)) for word in range(size)}
        distances = {word: float((token - words[word]).norm()) for word in range(size)}
        by_cosine = sorted(cosines, key=cosines.get, reverse=True)[:4]
        by_distance = sorted(distances, key=distances.get)[:4]
        assert [near.id for near in result.by_cosine] == by_cosine
        assert [near.id for near in result.by_distance] == by_distance
        assert [near.value for near in result.by_cosine] == pytest.approx([cosines[word] for word in by_cosine])
        assert result.norm == pytest.approx(float(token.norm()) / mean_norm)


def test_effective_rank():
    orthogonal = torch.linalg.qr(torch.randn(8, 5))[0].T
    assert effective_rank(orthogonal) == pytest.approx(5)
    assert effective_rank(torch.ones(5, 8)) == pytest.approx(1)
    two_sizes = torch.diag(torch.tensor([3.0, 1.0]))  # shares 3/4 and 1/4
    assert effective_rank(two_sizes) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_prompt_of_low_rank_has_at_most_its_rank(load, rank):
    backbone = load("llama")
    method = DPT(length=6, rank=rank, backbone=backbone.spec)
    method.attach(backbone)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        assert effective_rank(method.prompt(None).tokens[0]) <= rank + 1e-6


def test_redundant_pairs_are_almost_parallel():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [-1.0, 0.0]])
    ((first, second, cosine),) = redundant_pairs(tokens)
    assert (first, second) == (0, 2)
    assert cosine == pytest.approx(3 / 9.01**0.5)
    assert_close(token_cosines(tokens).diagonal(), torch.ones(4, dtype=torch.float64))


def test_drift_is_relative_to_the_other_values():
    other = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    drift = measure_drift(torch.tensor([[2.0, 2.0], [0.0, 3.0]]), other)
    assert drift.distances == pytest.approx([1, 2])
    assert drift.cosines == pytest.approx([0.5**0.5, 1])
    assert drift.effective_rank == pytest.approx(1)  # both changes are along the second axis
    with pytest.raises(ValueError, match=r"shapes \[2, 2\] and \[3, 2\] cannot be compared"):
        measure_drift(other, torch.ones(3, 2))
