"""Initial rows of new tokens, compared with loops over tokens, positions and pairs."""

import json
import logging
import math

import pytest
import tiny
import torch
from safetensors.torch import save_file
from small_tokenizers import extend_by_words
from torch.testing import assert_close

from lightning_softprompt.backbones.tokenization.added_rows import AddedRow, read_vocabulary
from lightning_softprompt.inference.prompt import load_prompt, save_prompt
from lightning_softprompt.methods import Combined, LoRA, NewTokens
from lightning_softprompt.prompts.token_rows.distilled import Distilled, select_snippets, state_difference
from lightning_softprompt.prompts.token_rows.focus import Focus, sparsemax
from lightning_softprompt.prompts.token_rows.from_file import FromRows
from lightning_softprompt.prompts.token_rows.means import MeanOfSubwords, MeanOfVocabulary
from lightning_softprompt.prompts.token_rows.normal import NormalRows
from lightning_softprompt.vocabulary.token_vectors import embed_corpus

NEW = ["angioplasty", "cardiology", "never-used"]
TEXTS = ["a good film angioplasty", "angioplasty is a good dog", "cardiology is good", "dull film", "a cardiology dog"]


@pytest.fixture
def extended(tmp_path):
    """Returns the folder of a tokenizer with the new words, and a file of texts."""
    folder, _ = extend_by_words(tiny.tokenizer("llama"), NEW, tmp_path / "extended")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(folder), str(texts)


def rows_of(bases, first=100):
    return [AddedRow(first + number, str(number), str(number), base, 1) for number, base in enumerate(bases)]


def test_means_random_rows_and_files(load, tmp_path):
    backbone = load("llama")
    table, tokens = backbone.word_embeddings, rows_of([(7, 8), (9,)] * 500)
    tables = [table, -table]
    mean, output_mean = MeanOfSubwords()(backbone, tables, tokens)
    assert_close(mean[0], (table[7] + table[8]) / 2)
    assert_close(output_mean, -mean)
    inputs, outputs = MeanOfSubwords("first")(backbone, tables, tokens)
    assert_close(outputs[0], -table[7])
    assert_close(inputs, mean)
    assert_close(MeanOfVocabulary()(backbone, [table], tokens)[0], table.mean(0).expand(1000, -1))
    torch.manual_seed(0)
    [noisy] = MeanOfVocabulary(noise=1.0)(backbone, [table], tokens * 20)
    assert_close(noisy.T.cov(), table.T.cov(correction=0), atol=3e-3, rtol=0.1)
    assert NormalRows(0.5)(backbone, [table], tokens)[0].std() == pytest.approx(0.5, rel=0.02)
    save_file({"inputs": mean, "outputs": -mean}, tmp_path / "rows.safetensors")
    from_file = FromRows(str(tmp_path / "rows.safetensors"))
    assert_close(from_file(backbone, tables, tokens), [mean, -mean])
    with pytest.raises(ValueError, match=r"'inputs' of shape \[1, 32\]"):
        from_file(backbone, tables, tokens[:1])
    with pytest.raises(ValueError, match="cannot read"):
        FromRows(str(tmp_path / "missing"))(backbone, tables, tokens)


def test_sparsemax_is_the_projection_onto_the_simplex():
    torch.manual_seed(0)
    for scores in torch.randn(20, 7, dtype=torch.float64):
        [weights] = sparsemax(scores[None])
        low, high = float(scores.max()) - 1, float(scores.max())
        for _ in range(60):  # the threshold by bisection
            middle = (low + high) / 2
            total = sum(max(0.0, float(score) - middle) for score in scores)
            low, high = (middle, high) if total > 1 else (low, middle)
        assert_close(weights, torch.tensor([max(0.0, float(score) - low) for score in scores], dtype=torch.float64))


def test_vectors_factorize_the_mutual_information_of_neighbors():
    sequences = [[1, 2, 3, 1, 2], [3, 4, 1], [4, 3, 2, 9]]
    ids, vectors = embed_corpus(sequences, size=3, window=2, min_count=2)
    assert ids.tolist() == [1, 2, 3, 4]
    counts = torch.zeros(10, 10, dtype=torch.float64)
    for sequence in sequences:
        for i, first in enumerate(sequence):
            for j, second in enumerate(sequence):
                if 0 < abs(i - j) <= 2:
                    counts[first, second] += 1
    counts = counts[1:5, 1:5]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            ratio = counts[i, j] * counts.sum() / (counts[i].sum() * counts[j].sum())
            expected[i, j] = max(0.0, math.log(ratio)) if ratio else 0.0
    left, singular, _ = torch.linalg.svd(expected)
    gram = left[:, :3] * singular[:3] @ left[:, :3].T
    assert_close(vectors.double() @ vectors.double().T, gram, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="min_count"):
        embed_corpus(sequences, size=3, window=2, min_count=100)


def test_focus_sums_the_rows_of_similar_tokens(load, extended, caplog):
    folder, texts = extended
    backbone, tokens = load("llama", vocabulary=folder), read_vocabulary(folder).rows
    tables = [backbone.word_embeddings[: tokens[0].id], backbone.head.layer.weight[: tokens[0].id]]
    with caplog.at_level(logging.WARNING):
        rows = Focus(texts, size=4, window=2, min_count=1)(backbone, tables, tokens)
    assert "1 of 3 new tokens occur fewer than 1 times" in caplog.text
    sequences = [backbone.codec.tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    ids, vectors = embed_corpus(sequences, 4, 2, 1)
    vector_of = dict(zip(ids.tolist(), vectors, strict=True))
    existing = [id for id in ids.tolist() if id < tokens[0].id]
    for number, token in enumerate(tokens[:2]):
        cosines = [torch.cosine_similarity(vector_of[token.id], vector_of[id], dim=0) for id in existing]
        weights = sparsemax(torch.stack(cosines)[None])[0]
        for table, result in zip(tables, rows, strict=True):
            assert_close(result[number], sum(weight * table[id] for weight, id in zip(weights, existing, strict=True)))
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert torch.isfinite(rows[0]).all()


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_difference_of_states_is_the_mean_over_positions(family, load, tmp_path):
    folder, _ = extend_by_words(tiny.tokenizer(family), NEW, tmp_path / family)
    backbone, plain = load(family, vocabulary=str(folder)), load(family)
    first = read_vocabulary(folder).rows[0].id
    subwords = {first: (7, 8, 9), first + 1: (10,)}
    snippets = [(5, 6, first, 7), (first + 1, first, 8, 9, 10, 11)]
    total, count = 0.0, 0
    for snippet in snippets:
        start = plain.codec.start
        old = [id for new in snippet for id in subwords.get(new, (new,))]
        new_states = states_of(backbone, [*start, *snippet])
        old_states = states_of(plain, [*start, *old])
        is_affected = not backbone.is_causal
        end = len(start)
        for place, id in enumerate(snippet):
            end += len(subwords.get(id, (id,)))
            is_affected = is_affected or id in subwords
            if is_affected:
                difference = new_states[len(start) + place] - old_states[end - 1]
                total, count = total + float(difference.pow(2).sum()), count + difference.numel()
    with torch.no_grad():
        assert state_difference(backbone, snippets, subwords).item() == pytest.approx(total / count, rel=1e-4)


@torch.no_grad()
def states_of(backbone, ids):
    """Returns the last states [T, H] of a row of a plain model."""
    return backbone.stack(input_ids=torch.tensor([ids])).last_hidden_state[0]


def test_snippets_contain_each_new_token_up_to_a_limit():
    sequences = [[1, 50, 2, 51, 3, 4, 5], [50, 1, 2], [50, 51, 7], [8, 9, 10], [50]]
    assert select_snippets(sequences, {50, 51}, limit=2, length=3) == [(1, 50, 2), (51, 3, 4), (50, 1, 2), (50, 51, 7)]
    assert select_snippets(sequences, {50, 51}, limit=1, length=3) == [(1, 50, 2), (51, 3, 4)]


def test_distilled_rows_lower_the_difference_and_leave_other_rows_unchanged(load, extended, caplog):
    folder, texts = extended
    backbone, tokens = load("llama", vocabulary=folder), list(read_vocabulary(folder).rows)
    tokens = [AddedRow(token.id, token.token, token.text, (20, 21 + n), 1) for n, token in enumerate(tokens)]
    tables = [backbone.word_embeddings[: tokens[0].id], backbone.head.layer.weight[: tokens[0].id]]
    before = {name: weight.clone() for name, weight in backbone.model.named_parameters()}
    start = MeanOfSubwords()(backbone, tables, tokens)
    init = Distilled(texts, epochs=20, batch_size=2, rate=0.02)
    torch.manual_seed(0)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        inputs, outputs = init(backbone, tables, tokens)
    assert "do not contain 1 of 3 new tokens" in caplog.text
    assert_close(inputs[2], start[0][2])
    assert_close(outputs, start[1])
    assert difference_with(backbone, tokens, inputs) < 0.5 * difference_with(backbone, tokens, start[0])
    for name, weight in backbone.model.named_parameters():
        if "embed_tokens" not in name:
            assert weight.equal(before[name]), name
    with pytest.raises(ValueError, match="has none of them"):
        Distilled(texts)(backbone, tables, tokens[2:])


def difference_with(backbone, tokens, rows):
    """Returns the difference of states for the texts, with rows in the embedding table."""
    subwords = {token.id: token.base for token in tokens}
    ids = [backbone.codec.tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    snippets = [tuple(row) for row in ids if set(row) & subwords.keys()]
    with torch.no_grad():
        backbone.word_embeddings[[token.id for token in tokens]] = rows
        return state_difference(backbone, snippets, subwords)


@pytest.mark.parametrize("with_lora", [False, True])
def test_trained_rows_load_without_the_texts_of_their_initial_values(with_lora, load, extended, tmp_path):
    folder, texts = extended
    backbone = load("llama", vocabulary=folder)
    rows = NewTokens(init=Distilled(texts, batch_size=2))
    module = Combined(parts=[rows, LoRA(rank=2)], backbone=backbone.spec) if with_lora else rows
    if not with_lora:
        module = NewTokens(init=Distilled(texts, batch_size=2), backbone=backbone.spec)
    module.attach(backbone, seed=0)
    path = save_prompt(module, tmp_path / "prompt.safetensors")
    (tmp_path / "texts.jsonl").unlink()
    loaded = load_prompt(path).method
    assert_close(dict(loaded.state_dict()), dict(module.state_dict()))
    with pytest.raises(ValueError, match="texts"):
        NewTokens(init=Distilled(texts), backbone=backbone.spec).attach(load("llama", vocabulary=folder))


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: Focus(""), "requires texts"),
        (lambda: Focus("a.txt", window=0), "window of Focus must be at least 1"),
        (lambda: Distilled([]), "requires texts"),
        (lambda: Distilled("a.txt", snippets=0), "snippets of Distilled must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(create, message):
    with pytest.raises(ValueError, match=message):
        create()
