"""The first token of rows of a causal backbone: as the tokenizer adds it, BOS, or none, and never twice."""

from dataclasses import replace

import pytest
import tiny
import torch
from tiny import BOS, EOS, batch_of
from tokenizers.processors import TemplateProcessing

from lightning_softprompt.backbones.causal import CausalCodec
from lightning_softprompt.backbones.loading import load_backbone, load_codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import SoftPrompt

CHAT = "<s>user {text}</s> {soft}<s>bot {target}"


def tokenizer(bos="<s>", adds=False):
    tokens = tiny.tokenizer("llama")
    tokens.bos_token = bos
    form = "<s> $A" if adds else "$A"
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=[("<s>", BOS)])
    return tokens


@pytest.mark.parametrize(
    ("bos", "adds", "start_token", "start", "has_remark"),
    [
        ("<s>", True, "auto", (BOS,), False),
        ("<s>", False, "auto", (BOS,), True),
        (None, False, "auto", (), False),
        (None, True, "auto", (BOS,), False),
        ("<s>", False, "tokenizer", (), False),
        ("<s>", True, "none", (), True),
        (None, False, "bos", (EOS,), True),
    ],
)
def test_the_tokenizer_decides_unless_the_option_start_token_does(bos, adds, start_token, start, has_remark):
    codec = CausalCodec(tokenizer(bos, adds), start_token=start_token)
    row = codec.encode(Template("{text}{soft} it was {target}").pieces({"text": "a film"}), "good")
    assert (codec.start, row.ids[: len(start)]) == (start, start)
    assert row.slots == (len(start) + 2,)
    assert (codec.remark is not None) == has_remark


@pytest.mark.parametrize("template", [CHAT, "{soft}<s>user {text} {target}"])
def test_a_chat_template_does_not_begin_twice(template):
    codec = CausalCodec(tokenizer())
    row = codec.encode(Template(template).pieces({"text": "<s> film"}), "good")
    assert row.ids[0] == BOS
    assert row.ids[1] != BOS
    data = codec.encode(Template("{soft}{text} {target}").pieces({"text": "<s> film"}), "good")
    assert data.ids[0] == BOS  # of the template, because data produces no control token
    assert len(data.ids) == 1 + 3 + 1 + 1


def test_a_row_without_text_begins_with_eos():
    codec = CausalCodec(tokenizer(None))
    row = codec.encode(Template("{soft}{text}{target}").pieces({"text": ""}), "good")
    assert (row.ids[0], row.answers) == (EOS, (1,))


def test_max_tokens_counts_the_first_token():
    codec = CausalCodec(tokenizer())
    template = Template("<s>{soft}{text} {target}", truncate=["text"])
    row = codec.encode(template.pieces({"text": "a film " * 9}), "good", max_tokens=8)
    assert (len(row.ids), row.ids.count(BOS)) == (8, 1)


def test_the_option_start_token_requires_a_causal_backbone(tiny_folder):
    with pytest.raises(ValueError, match="start_token=none requires a causal backbone"):
        load_codec(BackboneSpec(str(tiny_folder("bert")), start_token="none"))


@pytest.mark.parametrize("packed", [True, False])
def test_soft_tokens_can_come_first(tiny_folder, packed):
    """Compares with the plain model on the embeddings of each row."""
    backbone = load_backbone(BackboneSpec(str(tiny_folder("llama")), start_token="none", packed=packed))
    batch = batch_of(backbone.codec)
    tokens = torch.randn(1, 3, 32)
    logits = backbone(batch, SoftPrompt(tokens=tokens))
    for b, row in enumerate(batch.require_encoded()):
        embeds = torch.cat([tokens, backbone.embed(torch.tensor(row.ids))[None]], 1)
        expected = backbone.model(inputs_embeds=embeds).logits[0, row.answers[0] + 2 : -1]
        torch.testing.assert_close(logits[b, : len(row.targets)], expected, atol=1e-5, rtol=1e-5)
    generated = backbone.generate(replace(batch), SoftPrompt(tokens=tokens), max_new_tokens=2)
    assert generated.shape[0] == len(batch)
