"""Generation of encoder-decoders: the decoder starts as in training, and batches give the answers of single rows."""

import pytest
import torch
from architectures import Architecture, save
from tiny import BOS, EOS, UNK, batch_of

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import SoftPrompt

MAX_NEW_TOKENS = 6
TEMPLATE = "{text}{soft} it was {target}"
TEXTS = ("it is a sad story about a dog that never ends well and it was very long", "dull", "this film , good ?")
NO_END = {"forced_eos_token_id": None}
MODELS = {  # a model, and a part of the description of its path
    "scaled embeddings": (Architecture("pegasus", NO_END), "caches keys and values"),
    "forced opening": (Architecture("bart", {**NO_END, "forced_bos_token_id": BOS}), "caches keys and values"),
}


@torch.no_grad()
def decode_greedily(backbone, row, tokens):
    """Returns the greedy answer to one row by forward passes, and the margin of each token over the second best."""
    model, slot, answer, margins = backbone.model, row.slots[0], [], []
    config = model.generation_config
    forced = [] if config.forced_bos_token_id is None else [config.forced_bos_token_id]
    length = tokens.shape[1]
    placeholders = [UNK] * length
    ids = torch.tensor([[*row.ids[:slot], *placeholders, *row.ids[slot:]]])

    def insert(_, args, out):
        return torch.cat([out[:, :slot], tokens, out[:, slot + length :]], dim=1)

    while len(answer) < MAX_NEW_TOKENS and EOS not in answer:
        decoder_ids = torch.tensor([[config.decoder_start_token_id, *forced, *answer]])
        handle = model.get_encoder().get_input_embeddings().register_forward_hook(insert)
        try:
            encoded = model.get_encoder()(input_ids=ids)
        finally:
            handle.remove()
        logits = model(encoder_outputs=encoded, decoder_input_ids=decoder_ids, use_cache=False).logits[0, -1]
        best, second = logits.topk(2).values
        answer.append(int(logits.argmax()))
        margins.append(float(best - second))
    return answer, margins


@pytest.mark.parametrize(("architecture", "description"), MODELS.values(), ids=MODELS.keys())
def test_a_batch_gets_the_answers_of_single_rows(architecture, description, tmp_path):
    backbone = load_backbone(BackboneSpec(name=str(save(architecture, tmp_path))))
    torch.manual_seed(1)
    scale = backbone.embed(torch.arange(5, 40)[None]).std()
    tokens = torch.randn(1, 4, backbone.hidden_size) * scale
    batch = batch_of(backbone.codec, TEMPLATE, TEXTS, [""] * len(TEXTS))
    for options in ({}, {"use_cache": False}):
        answers = backbone.generate(batch, SoftPrompt(tokens=tokens), max_new_tokens=MAX_NEW_TOKENS, **options)
        for row, ids in zip(batch.require_encoded(), answers.tolist(), strict=True):
            expected, margins = decode_greedily(backbone, row, tokens)
            length = next((i for i, margin in enumerate(margins) if margin < 1e-4), len(margins))
            assert ids[:length] == expected[:length]  # rounding determines later tokens
    assert description in backbone.generation_description
