"""How models of different caches generate: by the fastest path that agrees with the forward pass of a row alone."""

from functools import partial

import pytest
import torch
from architectures import Architecture, save
from tiny import EOS, batch_of, encode_rows

from lightning_softprompt.backbones.conversation import Conversation
from lightning_softprompt.backbones.generation import path_choice, paths
from lightning_softprompt.backbones.generation.path_choice import GenerationUnsupportedError
from lightning_softprompt.backbones.generation.paths import EqualLengths, LeftPadded, SharedPrompt, WithoutCache
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.cli.commands import doctor
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import SoftPrompt

MOST = 6
TEMPLATES = {"front": "{soft}{text} it was {target}", "middle": "{text}{soft} it was {target}"}
LONG = "it is a sad story about a dog that never ends well and it was very long and dull"  # beyond the windows
BATCHES = {"short": ("a warm and funny film", "dull", "good ?"), "long": (LONG, "dull", "this film , good ?")}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
MODELS = {  # a model, and the path of its front prompt
    "windows": (Architecture("mistral", {"sliding_window": 6}), SharedPrompt),
    "window of chunks": (Architecture("llama4_text", {"attention_chunk_size": 6}), SharedPrompt),
    "linear biases": (Architecture("mpt"), SharedPrompt),
    "latent attention": (Architecture("deepseek_v3"), SharedPrompt),
    "states": (Architecture("mamba"), LeftPadded),
    "hybrid": (Architecture("lfm2", {"layer_types": ["conv", "full_attention"]}), LeftPadded),
    "padding counts": (Architecture("rwkv"), EqualLengths),
    "long positions": (
        Architecture(
            "phi3",
            {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 12, "partial_rotary_factor": 1.0},
             "original_max_position_embeddings": 12},
        ),
        EqualLengths,
    ),
    "positions of their own": (Architecture("roberta", {"is_decoder": True}), WithoutCache),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def model_and_path(request, tmp_path_factory):
    architecture, path = request.param
    folder = save(architecture, tmp_path_factory.mktemp(architecture.model_type))
    return load_backbone(BackboneSpec(name=str(folder))), path


def soft(backbone):
    torch.manual_seed(1)
    size = backbone.embed(torch.arange(5, 40)[None]).std()
    return SoftPrompt(tokens=torch.randn(1, 4, backbone.hidden_size) * size)


@torch.no_grad()
def alone(backbone, row, prompt):
    """The greedy answer to one row, each token by a plain forward pass, and by how much it leads."""
    ids, slot = row.ids, row.slots[0]
    tokens = prompt.tokens if prompt is not None else backbone.embed(torch.zeros(1, 0, dtype=torch.long))
    answer, leads = [], []

    def put(_, args, out):
        return torch.cat([out[:, :slot], tokens, out[:, slot + tokens.shape[1] :]], dim=1)

    while len(answer) < MOST and EOS not in answer:
        read = [*ids[:slot], *[3] * tokens.shape[1], *ids[slot:], *answer]
        handle = backbone.model.get_input_embeddings().register_forward_hook(put)
        try:
            logits = backbone.model(input_ids=torch.tensor([read]), use_cache=False).logits[0, -1]
        finally:
            handle.remove()
        best = logits.topk(2).values
        answer.append(int(logits.argmax()))
        leads.append(float(best[0] - best[1]))
    return answer, leads


def assert_answers(backbone, batch, prompt, found):
    """Answers are those of rows alone, up to tokens between which rounding decides."""
    for row, ids in zip(batch.require_encoded(), found.tolist(), strict=True):
        answer, leads = alone(backbone, row, prompt)
        sure = next((i for i, lead in enumerate(leads) if lead < 1e-4), len(leads))
        assert ids[:sure] == answer[:sure]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_batch_is_generated_as_each_row_alone(model_and_path, template):
    backbone, path = model_and_path
    prompt = soft(backbone)
    for texts in BATCHES.values():
        batch = batch_of(backbone.codec, TEMPLATES[template], texts, [""] * len(texts))
        for given in (prompt, None):
            for options in ({}, {"use_cache": False}):
                found = backbone.generate(batch, given, max_new_tokens=MOST, **options)
                assert_answers(backbone, batch, given, found)
    if template == "front":
        assert type(next(iter(backbone.generator.attempts.values())).paths[0]) is path
        assert path.description in backbone.generator.execution_description


def test_beams_have_the_likelihood_of_the_forward_pass(model_and_path):
    backbone, _ = model_and_path
    prompt = soft(backbone)
    (row,) = encode_rows(backbone.codec, TEMPLATES["front"], [LONG], [""])
    batch = backbone.codec.collate([row])
    lengths = {"max_new_tokens": 3, "min_new_tokens": 3}
    beams = backbone.generate(batch, prompt, num_beams=3, num_return_sequences=3, **lengths)
    of_text = [backbone.codec.collate([backbone.codec.with_answer(row, ids)]) for ids in beams.tolist()]
    with torch.no_grad():
        scores = torch.stack([-backbone.cross_entropy(each, prompt).sum() for each in of_text])
    torch.testing.assert_close(scores, scores.sort(descending=True).values, rtol=1e-3, atol=1e-3)


def test_a_conversation_continues_as_the_whole_text_would(model_and_path):
    backbone, _ = model_and_path
    prompt = soft(backbone)
    (row,) = encode_rows(backbone.codec, TEMPLATES["middle"], ["a warm film"], [""])
    conversation = Conversation(backbone, backbone.codec.collate([row]), prompt)
    first = conversation.answer(max_new_tokens=MOST)
    assert_answers(backbone, backbone.codec.collate([row]), prompt, first)
    conversation.add("dull dog and that was it")
    second = conversation.answer(max_new_tokens=MOST)
    text = [*first[0].tolist(), *backbone.codec.ids("dull dog and that was it")]
    answer, leads = alone(backbone, row._replace(ids=(*row.ids, *text)), prompt)
    sure = next((i for i, lead in enumerate(leads) if lead < 1e-4), len(leads))
    assert second[0, :sure].tolist() == answer[:sure]


def test_what_goes_beyond_all_earlier_batches_is_tried_out_again(load, monkeypatch):
    backbone, tried = load("llama"), []
    measure = path_choice.error_of
    monkeypatch.setattr(
        path_choice, "error_of", lambda path, rows, *rest: tried.append(type(path)) or measure(path, rows, *rest)
    )
    generate = partial(backbone.generate, prompt=soft(backbone), max_new_tokens=3)
    short, long = (batch_of(backbone.codec, TEMPLATES["front"], t, [""] * len(t)) for t in BATCHES.values())
    for batch, count in ((short, 1), (short, 1), (long, 2), (short, 2), (long, 2)):
        generate(batch)
        assert len(tried) == count


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


def test_the_doctor_reports_the_path(tiny_folder, capsys):
    for family, words in (("llama", "the shared prompt runs once"), ("t5", "rows run together, padded on the right")):
        for finding in doctor.speed(str(tiny_folder(family))):
            print(finding.name, finding.text)
        assert f"generation {words}" in capsys.readouterr().out
