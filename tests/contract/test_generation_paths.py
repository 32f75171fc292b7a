"""Generation of models with different caches: the fastest path that gives the answers of single rows."""

from functools import partial

import pytest
import torch
from architectures import Architecture, save
from tiny import EOS, UNK, batch_of, encode_rows

from lightning_softprompt.backbones.conversation import Conversation
from lightning_softprompt.backbones.generation import path_choice, paths
from lightning_softprompt.backbones.generation.path_choice import GenerationUnsupportedError
from lightning_softprompt.backbones.generation.paths import EqualLengths, LeftPadded, SharedPrompt, WithoutCache
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.cli.commands import doctor
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import SoftPrompt

MAX_NEW_TOKENS = 6
MIN_MARGIN = 1e-4  # of the best logit over the second best; rounding determines smaller ones
TEMPLATES = {"front": "{soft}{text} it was {target}", "middle": "{text}{soft} it was {target}"}
LONG = "it is a sad story about a dog that never ends well and it was very long and dull"  # longer than the windows
BATCHES = {"short": ("a warm and funny film", "dull", "good ?"), "long": (LONG, "dull", "this film , good ?")}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
MODELS = {  # a model, and its path with the prompt in front
    "windows": (Architecture("mistral", {"sliding_window": 6}), SharedPrompt),
    "window of chunks": (Architecture("llama4_text", {"attention_chunk_size": 6}), SharedPrompt),
    "linear biases": (Architecture("mpt"), SharedPrompt),
    "latent attention": (Architecture("deepseek_v3"), SharedPrompt),
    "states": (Architecture("mamba"), LeftPadded),
    "hybrid": (Architecture("lfm2", {"layer_types": ["conv", "full_attention"]}), LeftPadded),
    "padding with effect": (Architecture("rwkv"), EqualLengths),
    "long positions": (
        Architecture(
            "phi3",
            {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 12, "partial_rotary_factor": 1.0},
             "original_max_position_embeddings": 12},
        ),
        EqualLengths,
    ),
    "positions from ids": (Architecture("roberta", {"is_decoder": True}), WithoutCache),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def model_and_path(request, tmp_path_factory):
    architecture, path = request.param
    folder = save(architecture, tmp_path_factory.mktemp(architecture.model_type))
    return load_backbone(BackboneSpec(name=str(folder))), path


def random_prompt(backbone):
    torch.manual_seed(1)
    scale = backbone.embed(torch.arange(5, 40)[None]).std()
    return SoftPrompt(tokens=torch.randn(1, 4, backbone.hidden_size) * scale)


@torch.no_grad()
def decode_greedily(backbone, row, prompt):
    """Returns the greedy answer to one row by forward passes, up to the first token that rounding determines."""
    slot, answer = row.slots[0], []
    tokens = prompt.tokens if prompt is not None else backbone.embed(torch.zeros(1, 0, dtype=torch.long))
    length = tokens.shape[1]
    ids = [*row.ids[:slot], *[UNK] * length, *row.ids[slot:]]

    def insert(_, args, out):
        return torch.cat([out[:, :slot], tokens, out[:, slot + length :]], dim=1)

    while len(answer) < MAX_NEW_TOKENS and EOS not in answer:
        handle = backbone.model.get_input_embeddings().register_forward_hook(insert)
        try:
            logits = backbone.model(input_ids=torch.tensor([[*ids, *answer]]), use_cache=False).logits[0, -1]
        finally:
            handle.remove()
        best, second = logits.topk(2).values
        if best - second < MIN_MARGIN:
            break
        answer.append(int(logits.argmax()))
    return answer


def assert_answers(backbone, batch, prompt, answers):
    """Compares answers to a batch with the answers to its rows alone."""
    for row, ids in zip(batch.require_encoded(), answers.tolist(), strict=True):
        expected = decode_greedily(backbone, row, prompt)
        assert ids[: len(expected)] == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_batch_gets_the_answers_of_single_rows(model_and_path, template):
    backbone, path = model_and_path
    prompt = random_prompt(backbone)
    for texts in BATCHES.values():
        batch = batch_of(backbone.codec, TEMPLATES[template], texts, [""] * len(texts))
        for prompt_or_none in (prompt, None):
            for options in ({}, {"use_cache": False}):
                answers = backbone.generate(batch, prompt_or_none, max_new_tokens=MAX_NEW_TOKENS, **options)
                assert_answers(backbone, batch, prompt_or_none, answers)
    if template == "front":
        attempt = next(iter(backbone.generator.attempts.values()))
        assert type(attempt.paths[0]) is path
        assert path.description in backbone.generator.execution_description


def test_beams_are_sorted_by_the_score_of_the_forward_pass(model_and_path):
    backbone, _ = model_and_path
    prompt = random_prompt(backbone)
    (row,) = encode_rows(backbone.codec, TEMPLATES["front"], [LONG], [""])
    batch = backbone.codec.collate([row])
    lengths = {"max_new_tokens": 3, "min_new_tokens": 3}
    beams = backbone.generate(batch, prompt, num_beams=3, num_return_sequences=3, **lengths)
    codec = backbone.codec
    batches = [codec.collate([codec.with_answer(row, ids)]) for ids in beams.tolist()]
    with torch.no_grad():
        scores = torch.stack([-backbone.cross_entropy(each, prompt).sum() for each in batches])
    torch.testing.assert_close(scores, scores.sort(descending=True).values, rtol=1e-3, atol=1e-3)


def test_a_conversation_gives_the_answers_of_the_whole_text(model_and_path):
    backbone, _ = model_and_path
    prompt = random_prompt(backbone)
    (row,) = encode_rows(backbone.codec, TEMPLATES["middle"], ["a warm film"], [""])
    conversation = Conversation(backbone, backbone.codec.collate([row]), prompt)
    first = conversation.answer(max_new_tokens=MAX_NEW_TOKENS)
    assert_answers(backbone, backbone.codec.collate([row]), prompt, first)
    conversation.add("dull dog and that was it")
    second = conversation.answer(max_new_tokens=MAX_NEW_TOKENS)
    text = [*first[0].tolist(), *backbone.codec.ids("dull dog and that was it")]
    expected = decode_greedily(backbone, row._replace(ids=(*row.ids, *text)), prompt)
    assert second[0, : len(expected)].tolist() == expected


def test_a_batch_larger_than_all_earlier_ones_repeats_the_trial(load, monkeypatch):
    backbone, trials = load("llama"), []
    error_of = path_choice.error_of

    def record_trial(path, *args):
        trials.append(type(path))
        return error_of(path, *args)

    monkeypatch.setattr(path_choice, "error_of", record_trial)
    generate = partial(backbone.generate, prompt=random_prompt(backbone), max_new_tokens=3)
    short, long = (batch_of(backbone.codec, TEMPLATES["front"], texts, [""] * len(texts)) for texts in BATCHES.values())
    for batch, count in ((short, 1), (short, 1), (long, 2), (short, 2), (long, 2)):
        generate(batch)
        assert len(trials) == count


def test_a_model_that_cannot_generate_is_refused_by_name(load, monkeypatch):
    backbone = load("llama")

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(paths, "generate", fail)
    batch = batch_of(backbone.codec)
    for _ in range(2):
        with pytest.raises(GenerationUnsupportedError, match=r"LlamaForCausalLM\) cannot generate: no kernel"):
            backbone.generate(batch, max_new_tokens=2)
    assert "cannot generate: no kernel" in backbone.generator.execution_description


@pytest.mark.parametrize(
    ("family", "path"),
    [("llama", "the shared prompt runs once"), ("t5", "rows run together, padded on the right")],
)
def test_the_doctor_reports_the_path(tiny_folder, family, path):
    findings = {finding.name: finding.text for finding in doctor.speed(str(tiny_folder(family)))}
    assert findings["generation"].startswith(path)
