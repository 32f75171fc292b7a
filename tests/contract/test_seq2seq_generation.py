"""How encoder-decoders generate: their decoder opens as in training, and a batch gets what each row gets alone."""

import pytest
import torch
from architectures import Architecture, save
from tiny import BOS, EOS, UNK, batch_of

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import SoftPrompt

MOST = 6
TEMPLATE = "{text}{soft} it was {target}"
TEXTS = ("it is a sad story about a dog that never ends well and it was very long", "dull", "this film , good ?")
NO_END = {"forced_eos_token_id": None}
MODELS = {  # a model, and how its rows run
    "scaled embeddings": (Architecture("pegasus", NO_END), "caches keys and values"),
    "forced opening": (Architecture("bart", {**NO_END, "forced_bos_token_id": BOS}), "caches keys and values"),
}


@torch.no_grad()
def alone(backbone, row, tokens):
    """The greedy answer to one row, each token by a plain forward pass, and by how much it leads."""
    model, slot, answer, leads = backbone.model, row.slots[0], [], []
    config = model.generation_config
    forced = [] if config.forced_bos_token_id is None else [config.forced_bos_token_id]
    ids = torch.tensor([[*row.ids[:slot], *[UNK] * tokens.shape[1], *row.ids[slot:]]])

    def put(_, args, out):
        return torch.cat([out[:, :slot], tokens, out[:, slot + tokens.shape[1] :]], dim=1)

    while len(answer) < MOST and EOS not in answer:
        read = torch.tensor([[config.decoder_start_token_id, *forced, *answer]])
        handle = model.get_encoder().get_input_embeddings().register_forward_hook(put)
        try:
            encoded = model.get_encoder()(input_ids=ids)
        finally:
            handle.remove()
        logits = model(encoder_outputs=encoded, decoder_input_ids=read, use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        answer.append(int(logits.argmax()))
        leads.append(float(best[0] - best[1]))
    return answer, leads


@pytest.mark.parametrize(("architecture", "way"), MODELS.values(), ids=MODELS.keys())
def test_a_batch_is_generated_as_each_row_alone(architecture, way, tmp_path):
    backbone = load_backbone(BackboneSpec(name=str(save(architecture, tmp_path))))
    torch.manual_seed(1)
    tokens = torch.randn(1, 4, backbone.hidden_size) * backbone.embed(torch.arange(5, 40)[None]).std()
    batch = batch_of(backbone.codec, TEMPLATE, TEXTS, [""] * len(TEXTS))
    for options in ({}, {"use_cache": False}):
        found = backbone.generate(batch, SoftPrompt(tokens=tokens), max_new_tokens=MOST, **options)
        for row, ids in zip(batch.require_encoded(), found.tolist(), strict=True):
            answer, leads = alone(backbone, row, tokens)
            sure = next((i for i, lead in enumerate(leads) if lead < 1e-4), len(leads))
            assert ids[:sure] == answer[:sure]
    assert way in backbone.generation_description
