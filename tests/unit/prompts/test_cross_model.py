"""Soft tokens that go from one backbone to another."""

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
    """The folder of another backbone, and the file of soft tokens that are words of it."""
    source, path = load("llama", seed=1), tmp_path / "prompt.safetensors"
    tokens = embed_tokens(source, torch.tensor(source.codec.ids(WORDS)))
    write_prompt(path, SavedPrompt({"tokens": tokens}, backbone_identity(source), {}))
    return str(tiny_folder("llama", 1)), path


def test_words_of_a_backbone_are_the_same_words_of_one_whose_space_is_turned(prompt, load):
    source, path = prompt
    target = load("llama", seed=1)
    target.word_embeddings.data @= torch.linalg.qr(torch.randn(32, 32)).Q
    start = FromAnchors(str(path), source, 1e-9)(target, 5)
    assert_close(start, embed_tokens(target, torch.tensor(target.codec.ids(WORDS))), atol=1e-4, rtol=1e-4)


def test_any_tokens_are_turned_with_the_space():
    there, turn, tokens = torch.randn(90, 12), torch.linalg.qr(torch.randn(12, 12)).Q, torch.randn(4, 12)
    assert_close(FromAnchors("", "", 1e-9).map_tokens(tokens, there, there @ turn), tokens @ turn, atol=1e-5, rtol=1e-5)


def test_the_mixture_is_ridge_regression():
    there, here, tokens = torch.randn(20, 6), torch.randn(20, 9), torch.randn(3, 6)
    r = 0.3 * there.square().sum(0).mean()
    shares = torch.linalg.solve(there @ there.T + r * torch.eye(20), there @ tokens.T).T  # of each anchor
    assert_close(FromAnchors("", "", 0.3).map_tokens(tokens, there, here), shares @ here, atol=1e-4, rtol=1e-4)


def test_anchors_are_words_of_both(load, backbone):
    source = load("llama").codec
    there, here = anchors(source, backbone.codec)
    words = source.tokenizer.convert_ids_to_tokens(there)
    assert words == backbone.codec.tokenizer.convert_ids_to_tokens(here)
    assert {"dog", "sad"} <= set(words)
    assert all(word.isalpha() for word in words)


def test_what_does_not_fit_is_told(prompt, backbone, tiny_folder):
    source, path = prompt
    with pytest.raises(ValueError, match="has 5 soft tokens, but length is 4"):
        FromAnchors(str(path), source)(backbone, 4)
    with pytest.raises(ValueError, match="trained on"):
        FromAnchors(str(path), str(tiny_folder("llama", 0)))(backbone, 5)
    with pytest.raises(ValueError, match="ridge must be above 0"):
        FromAnchors(str(path), source, 0.0)
