"""The token that opens rows of a causal backbone: the tokenizer's own, its BOS, or none, and never twice."""

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
    made = tiny.tokenizer("llama")
    made.bos_token = bos
    around = "<s> $A" if adds else "$A"
    made.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=[("<s>", BOS)])
    return made


@pytest.mark.parametrize(
    ("bos", "adds", "start_token", "start", "is_remarked"),
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
def test_the_tokenizer_is_asked_unless_an_option_says_otherwise(bos, adds, start_token, start, is_remarked):
    codec = CausalCodec(tokenizer(bos, adds), start_token=start_token)
    row = codec.encode(Template("{text}{soft} it was {target}").pieces({"text": "a film"}), "good")
    assert (codec.start, row.ids[: len(start)]) == (start, start)
    assert row.slots == (len(start) + 2,)
    assert (codec.remark is not None) == is_remarked


@pytest.mark.parametrize("template", [CHAT, "{soft}<s>user {text} {target}"])
def test_a_chat_form_does_not_begin_twice(template):
    codec = CausalCodec(tokenizer())
    row = codec.encode(Template(template).pieces({"text": "<s> film"}), "good")
    assert row.ids[0] == BOS
    assert row.ids[1] != BOS
    data = codec.encode(Template("{soft}{text} {target}").pieces({"text": "<s> film"}), "good")
    assert data.ids[0] == BOS  # the template's, since data means no control token
    assert len(data.ids) == 1 + 3 + 1 + 1


def test_a_row_without_text_begins_with_a_token():
    codec = CausalCodec(tokenizer(None))
    row = codec.encode(Template("{soft}{text}{target}").pieces({"text": ""}), "good")
    assert (row.ids[0], row.answers) == (EOS, (1,))


def test_the_room_of_a_row_counts_what_opens_it():
    codec = CausalCodec(tokenizer())
    template = Template("<s>{soft}{text} {target}", truncate=["text"])
    row = codec.encode(template.pieces({"text": "a film " * 9}), "good", max_tokens=8)
    assert (len(row.ids), row.ids.count(BOS)) == (8, 1)


def test_other_families_begin_rows_as_their_tokenizers_do(tiny_folder):
    with pytest.raises(ValueError, match="start_token=none requires a causal backbone"):
        load_codec(BackboneSpec(str(tiny_folder("bert")), start_token="none"))


@pytest.mark.parametrize("packed", [True, False])
def test_soft_tokens_may_come_first(tiny_folder, packed):
    """Against the plain model on the embeddings of each row."""
    backbone = load_backbone(BackboneSpec(str(tiny_folder("llama")), start_token="none", packed=packed))
    batch = batch_of(backbone.codec)
    tokens = torch.randn(1, 3, 32)
    found = backbone(batch, SoftPrompt(tokens=tokens))
    for b, row in enumerate(batch.require_encoded()):
        embeds = torch.cat([tokens, backbone.embed(torch.tensor(row.ids))[None]], 1)
        plain = backbone.model(inputs_embeds=embeds).logits[0, row.answers[0] + 2 : -1]
        torch.testing.assert_close(found[b, : len(row.targets)], plain, atol=1e-5, rtol=1e-5)
    said = backbone.generate(replace(batch), SoftPrompt(tokens=tokens), max_new_tokens=2)
    assert said.shape[0] == len(batch)
