"""Transfer of soft tokens from one backbone to another."""

import pytest
import torch
from torch.testing import assert_close

from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.prompts.cross_model import FromAnchors, anchors
from lightning_softprompt.prompts.init import embed_tokens

FAMILIES = ("t5",)
WORDS = "the dog is very sad"


@pytest.fixture
def prompt(load, tiny_folder, tmp_path):
    """The folder of another backbone, and a prompt file whose soft tokens are embeddings of its words."""
    source, path = load("llama", seed=1), tmp_path / "prompt.safetensors"
    tokens = embed_tokens(source, torch.tensor(source.codec.ids(WORDS)))
    write_prompt(path, SavedPrompt({"tokens": tokens}, backbone_identity(source), {}))
    return str(tiny_folder("llama", 1)), path


def test_words_are_mapped_to_the_same_words_of_a_rotated_embedding_space(prompt, load):
    source, path = prompt
    target = load("llama", seed=1)
    target.word_embeddings.data @= torch.linalg.qr(torch.randn(32, 32)).Q
    start = FromAnchors(str(path), source, 1e-9)(target, 5)
    assert_close(start, embed_tokens(target, torch.tensor(target.codec.ids(WORDS))), atol=1e-4, rtol=1e-4)


def test_arbitrary_tokens_are_rotated_with_the_embedding_space():
    source, tokens = torch.randn(90, 12), torch.randn(4, 12)
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    mapped = FromAnchors("", "", 1e-9).map_tokens(tokens, source, source @ rotation)
    assert_close(mapped, tokens @ rotation, atol=1e-5, rtol=1e-5)


def test_tokens_are_mapped_by_ridge_regression():
    source, target, tokens = torch.randn(20, 6), torch.randn(20, 9), torch.randn(3, 6)
    ridge = 0.3 * source.square().sum(0).mean()
    gram = source @ source.T + ridge * torch.eye(20)
    coefficients = torch.linalg.solve(gram, source @ tokens.T).T  # of each anchor
    mapped = FromAnchors("", "", 0.3).map_tokens(tokens, source, target)
    assert_close(mapped, coefficients @ target, atol=1e-4, rtol=1e-4)


def test_anchors_are_words_of_both_vocabularies(load, backbone):
    source = load("llama").codec
    source_ids, target_ids = anchors(source, backbone.codec)
    words = source.tokenizer.convert_ids_to_tokens(source_ids)
    assert words == backbone.codec.tokenizer.convert_ids_to_tokens(target_ids)
    assert {"dog", "sad"} <= set(words)
    assert all(word.isalpha() for word in words)


def test_an_invalid_length_backbone_or_ridge_is_rejected(prompt, backbone, tiny_folder):
    source, path = prompt
    with pytest.raises(ValueError, match="has 5 soft tokens, but length is 4"):
        FromAnchors(str(path), source)(backbone, 4)
    with pytest.raises(ValueError, match="trained on"):
        FromAnchors(str(path), str(tiny_folder("llama", 0)))(backbone, 5)
    with pytest.raises(ValueError, match="ridge must be above 0"):
        FromAnchors(str(path), source, 0.0)
