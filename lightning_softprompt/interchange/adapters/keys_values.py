"""Prefix tuning and Cartridge of PEFT: keys and values of every layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.folding import parameter_name
from lightning_softprompt.interchange.adapter_folder import EMBEDDINGS, AdapterFolder
from lightning_softprompt.interchange.adapters.base import FOLDED, AdapterKind, ImportedMethod

SELF = "self"  # the self-attention of a decoder


class KeyValueAdapter(AdapterKind):
    """Keys and values of every layer of a decoder, as free parameters.

    PEFT saves the output of a prefix network. Row p of its matrix is position p, as [2 L, N, D]: the key of layer i is
    at 2 i, its value at 2 i + 1.
    """

    peft_types = ("PREFIX_TUNING", "CARTRIDGE")
    precedes_start_token = False

    def convert(self, adapter: AdapterFolder, backbone: Backbone, task_names: Sequence[str]) -> ImportedMethod:
        """Returns `Folded` with the keys and values [1, N, P, D] of each layer."""
        sites = backbone.attentions.get(SELF)
        if set(backbone.attentions) != {SELF} or sites is None:
            raise ValueError(
                f"{adapter.path}: PEFT prefixes of encoders and encoder-decoders shift positions of the text; only "
                "those of decoders can be imported"
            )
        length, layers = adapter.read_count("num_virtual_tokens"), len(sites)
        adapter.check_count("num_layers", layers, "layers")
        adapter.check_count("num_attention_heads", sites.heads, "key/value heads")
        adapter.check_count("token_dim", sites.heads * sites.size, "numbers in the keys of a layer")
        width = 2 * layers * sites.heads * sites.size
        rows = adapter.read_tensor(EMBEDDINGS, (length, width), "virtual tokens, 2 x layers x key/value heads x size")
        by_slot = rows.view(length, 2 * layers, sites.heads, sites.size).permute(1, 2, 0, 3)  # [2 L, N, P, D]
        tensors: dict[str, Tensor] = {}
        for layer in range(layers):
            tensors[f"kv.{SELF}.{layer}.key"] = by_slot[2 * layer].unsqueeze(0)
            tensors[f"kv.{SELF}.{layer}.value"] = by_slot[2 * layer + 1].unsqueeze(0)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        parameters = {parameter_name(name): tensor for name, tensor in tensors.items()}
        return ImportedMethod(FOLDED, {"shapes": shapes, "blocks": None}, parameters)
