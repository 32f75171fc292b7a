import pytest
import torch
from torch.testing import assert_close

from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.prompts.init import (
    ClassLabels,
    FromCheckpoint,
    FromText,
    Normal,
    SampleVocabulary,
    Uniform,
    rms,
)

FAMILIES = ("llama", "t5")


def word_ids(backbone, tokens):
    """Return the id of the word whose embedding each soft token is."""
    is_equal = (tokens[:, None] == backbone.word_embeddings[None]).all(-1)
    assert is_equal.any(1).all()
    return is_equal.int().argmax(1).tolist()


@pytest.mark.parametrize(
    "init", [Uniform(), Normal(), SampleVocabulary(), FromText("it is"), ClassLabels(["good", "bad"])]
)
def test_every_initializer_returns_float32_and_follows_the_seed(init, family, load):
    backbone = load(family, dtype="bfloat16")
    torch.manual_seed(5)
    first = init(backbone, 6)
    torch.manual_seed(5)
    assert torch.equal(init(backbone, 6), first)
    torch.manual_seed(6)
    assert not torch.equal(init(backbone, 6), first)
    assert first.shape == (6, backbone.hidden_size)
    assert first.dtype == torch.float32
    assert not first.requires_grad


def test_random_tokens_have_the_scale_of_the_word_embeddings(backbone):
    size = backbone.word_embeddings.pow(2).mean().sqrt()
    assert rms(backbone) == pytest.approx(float(size))
    for init in (Uniform(), Normal()):
        assert_close(init(backbone, 2000).pow(2).mean().sqrt(), size, rtol=0.02, atol=0)


def test_the_scale_of_random_tokens_can_be_set(backbone):
    uniform = Uniform(0.5)(backbone, 2000)
    assert uniform.abs().max() <= 0.5
    assert_close(uniform.var(), torch.tensor(1 / 12), rtol=0.03, atol=0)  # the variance of an interval of length 1
    assert_close(Normal(0.3)(backbone, 2000).std(), torch.tensor(0.3), rtol=0.02, atol=0)


def test_sampled_words_repeat_only_if_there_are_too_few(backbone):
    drawn = word_ids(backbone, SampleVocabulary(first=6)(backbone, 15))
    assert sorted(drawn[:6]) == [0, 1, 2, 3, 4, 5]
    assert sorted(drawn[6:12]) == [0, 1, 2, 3, 4, 5]
    size = len(backbone.word_embeddings)
    all_words = word_ids(backbone, SampleVocabulary(first=None)(backbone, size))
    assert len(set(all_words)) == 44


def test_a_text_that_is_too_short_is_followed_by_words(backbone):
    words = word_ids(backbone, FromText("it is a film")(backbone, 6))
    assert words[:4] == backbone.codec.ids("it is a film")
    assert len(words) == 6


@pytest.mark.parametrize("length", [2, 4])
def test_a_text_can_fill_the_prompt(backbone, length):
    words = word_ids(backbone, FromText("it is a film")(backbone, length))
    assert words == backbone.codec.ids("it is a film")[:length]


def test_a_text_without_tokens_is_an_error(backbone):
    with pytest.raises(ValueError, match="at least one token, got ''"):
        FromText("")(backbone, 3)


def test_labels_are_the_mean_of_their_tokens(backbone):
    tokens = ClassLabels(["very good indeed", "bad"])(backbone, 3)
    table = backbone.word_embeddings
    assert_close(tokens[0], sum(table[i] for i in backbone.codec.ids("very good indeed")) / 3)
    assert word_ids(backbone, tokens[1:])[0] == backbone.codec.ids("bad")[0]


@pytest.mark.parametrize("length", [1, 2])
def test_labels_can_fill_the_prompt(backbone, length):
    words = word_ids(backbone, ClassLabels(["good", "bad"])(backbone, length))
    assert words == backbone.codec.ids("good bad")[:length]


def test_a_prompt_is_initialized_from_a_saved_prompt(backbone, load, family, tmp_path):
    tokens, file = torch.randn(3, backbone.hidden_size), tmp_path / "prompt.safetensors"
    write_prompt(file, SavedPrompt({"tokens": tokens.bfloat16()}, backbone_identity(backbone), {}))
    start = FromCheckpoint(str(file))(backbone, 3)
    assert torch.equal(start, tokens.bfloat16().float())
    with pytest.raises(ValueError, match="set length to 3"):
        FromCheckpoint(str(file))(backbone, 4)
    with pytest.raises(ValueError, match=r"has no 'other'; it has \['tokens'\]"):
        FromCheckpoint(str(file), name="other")(backbone, 3)
    with pytest.raises(ValueError, match="trained on"):
        FromCheckpoint(str(file))(load(family, seed=1), 3)


def test_the_initial_prompt_follows_the_seed_and_not_earlier_random_numbers(backbone):
    def start(seed, draws):
        torch.manual_seed(seed)
        torch.rand(draws)
        module = PromptTuning(length=3, backbone=backbone.spec)
        module.attach(backbone)
        return module.tokens

    assert torch.equal(start(1, 0), start(1, 7))
    assert not torch.equal(start(1, 0), start(2, 0))


def test_a_prompt_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        PromptTuning(length=0)


def load_scaled(load, factor):
    """A backbone whose embedding module multiplies its table, as some models do."""
    backbone = load("llama")
    table = backbone.model.get_input_embeddings()
    table.forward = lambda ids, forward=table.forward: forward(ids) * factor
    return backbone


def test_tokens_from_words_are_outputs_of_the_embedding_module(load):
    backbone = load_scaled(load, 8.0)
    ids = backbone.codec.ids("it is")
    assert_close(FromText("it is")(backbone, 2), 8 * backbone.word_embeddings[ids])
    label = ClassLabels(["good"])(backbone, 1)
    assert_close(label, 8 * backbone.word_embeddings[backbone.codec.ids("good")])
    drawn = SampleVocabulary()(backbone, 4)
    assert word_ids(backbone, drawn / 8)


def test_random_tokens_have_the_scale_of_the_outputs_of_the_embedding_module(load):
    plain, backbone = load("llama"), load_scaled(load, 8.0)
    assert backbone.embedding_scale == pytest.approx(8)
    assert rms(backbone) == pytest.approx(8 * rms(plain))
