"""Answers that are streamed: pieces of whole words, equal to the whole answer when joined."""

import pytest
import torch
from lightning import seed_everything

import lightning_softprompt as sp
from lightning_softprompt.inference.streaming import complete_words

ROW = "a warm and funny film"


@pytest.fixture
def prompt_of(tiny_folder):
    """A function from a family to an untrained prompt for free text, and the arguments of its decoding."""

    def prompt_of(family, seed=0, **decoding):
        data = sp.SummarizationDataModule(
            backbone=sp.BackboneSpec(name=str(tiny_folder(family, seed))), train=[{"document": ROW, "summary": "good"}],
            template="{soft}{document} it was {target}", max_tokens=24, max_target_tokens=8, cache=False,
            decoding=sp.Decoding(**decoding),
        )  # fmt: skip
        seed_everything(3)
        model = sp.PromptTuning(length=3, data=data)
        model.configure_model()
        return sp.Prompt(model)

    return prompt_of


@pytest.mark.parametrize(("family", "seed"), [("llama", 0), ("gpt2", 0), ("t5", 1), ("bart", 0)])
def test_joined_pieces_are_the_answer(family, seed, prompt_of):
    prompt = prompt_of(family, seed, max_new_tokens=8, min_new_tokens=8)
    (answer,) = prompt.generate(ROW)
    pieces = list(prompt.generate(ROW, stream=True))
    assert len(answer.split()) > 2
    assert "".join(pieces) == answer
    assert len(pieces) > 2
    assert all(len(piece.split()) == 1 for piece in pieces), "a piece is one word of this tokenizer"


def test_a_piece_is_yielded_before_later_tokens_are_generated(prompt_of):
    prompt = prompt_of("llama", max_new_tokens=8, min_new_tokens=8)
    prompt.generate(ROW)
    calls = []
    handle = prompt.backbone.model.register_forward_hook(lambda *_: calls.append(1))
    pieces = prompt.generate(ROW, stream=True)
    assert not calls
    next(pieces)
    assert 1 <= len(calls) < 8
    list(pieces)
    assert len(calls) == 8
    handle.remove()


def test_sampling_is_that_of_the_whole_answer_and_does_not_touch_the_random_state(prompt_of):
    prompt = prompt_of("llama", max_new_tokens=8, min_new_tokens=8, do_sample=True, seed=5)
    (answer,) = prompt.generate(ROW)
    torch.manual_seed(1)
    expected = torch.rand(20)
    torch.manual_seed(1)
    pieces, drawn = [], []
    for piece in prompt.generate(ROW, stream=True):
        pieces.append(piece)
        drawn.append(torch.rand(1))
    assert "".join(pieces) == answer
    assert torch.equal(torch.cat(drawn), expected[: len(drawn)])


def test_stop_texts_end_the_stream(prompt_of):
    prompt = prompt_of("llama", max_new_tokens=8, min_new_tokens=8)
    (answer,) = prompt.generate(ROW)
    last = answer.split()[-1]
    options = {"min_new_tokens": 0, "stop": [last]}
    pieces = list(prompt.generate(ROW, stream=True, **options))
    assert ["".join(pieces)] == prompt.generate(ROW, **options)
    assert last not in "".join(pieces)


def test_the_backbone_is_refused_until_the_stream_is_closed(prompt_of):
    prompt = prompt_of("llama", max_new_tokens=8, min_new_tokens=8)
    (answer,) = prompt.generate(ROW)
    pieces = prompt.generate(ROW, stream=True)
    next(pieces)
    with pytest.raises(RuntimeError, match="is generating a stream"):
        prompt.generate(ROW)
    with pytest.raises(RuntimeError, match="is generating a stream"):
        next(prompt.generate(ROW, stream=True))
    pieces.close()
    assert prompt.generate(ROW) == [answer]


def test_an_error_of_the_generation_reaches_the_caller(prompt_of, monkeypatch):
    prompt = prompt_of("llama")

    def fail(*args, **options):
        raise MemoryError("no memory left")

    monkeypatch.setattr(type(prompt.backbone), "generate", fail)
    with pytest.raises(MemoryError, match="no memory left"):
        list(prompt.generate(ROW, stream=True))
    monkeypatch.undo()
    assert len(prompt.generate(ROW)) == 1


def test_what_cannot_be_streamed_is_refused_at_once(prompt_of):
    prompt = prompt_of("llama")
    with pytest.raises(ValueError, match="one row, got 2"):
        prompt.generate([ROW, ROW], stream=True)
    with pytest.raises(ValueError, match="one row, got 0"):
        prompt.generate([], stream=True)
    with pytest.raises(ValueError, match="beam search, got num_beams=2"):
        prompt.generate(ROW, stream=True, num_beams=2)


@pytest.mark.parametrize("text", ["naïve café 🙂 ok", "日本語の文章です。", "a  b\nc d", "  two words "])
def test_pieces_have_whole_characters(text):
    encoded, yielded = text.encode(), ""
    for end in range(len(encoded)):
        complete = complete_words(encoded[:end].decode(errors="replace").strip())
        assert text.strip().startswith(complete)
        assert len(complete) >= len(yielded)
        yielded = complete
    assert len(yielded) >= len(text.strip()) // 3


def test_the_beginning_of_a_stop_text_is_not_yielded():
    text = "a lamp. And then: b"
    for end in range(len("a lamp. And then")):
        assert "And" not in complete_words(text[:end], stop=["And then:"])
    assert complete_words("a lamp. And more ", stop=["And then:"]) == "a lamp. And more"
