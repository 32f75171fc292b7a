"""Prompt tuning, P-tuning and CPT of PEFT: soft tokens before the text."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.folding import parameter_name
from lightning_softprompt.interchange.adapter_folder import EMBEDDINGS, AdapterFolder
from lightning_softprompt.interchange.adapters.base import FOLDED, AdapterKind, ImportedMethod


class TokenAdapter(AdapterKind):
    """Soft tokens before the text, as free parameters.

    PEFT saves the output of a P-tuning network and the projected tokens of CPT, so their networks are not in the file.
    For encoder-decoder models it saves the tokens of the encoder and as many for the decoder, which no forward pass of
    PEFT uses.
    """

    peft_types = ("PROMPT_TUNING", "P_TUNING", "CPT")
    precedes_start_token = True

    def convert(self, adapter: AdapterFolder, backbone: Backbone, task_names: Sequence[str]) -> ImportedMethod:
        """Returns `Folded` with the soft tokens [1, P, H]."""
        length = adapter.read_count("num_virtual_tokens")
        adapter.check_count("token_dim", backbone.hidden_size, "numbers in an embedding")
        copies = adapter.read_count("num_transformer_submodules", default=1)
        rows = adapter.read_tensor(EMBEDDINGS, (copies * length, backbone.hidden_size), "virtual tokens, hidden size")
        tokens = rows[:length].unsqueeze(0)
        arguments = {"shapes": {"tokens": list(tokens.shape)}, "blocks": None}
        return ImportedMethod(FOLDED, arguments, {parameter_name("tokens"): tokens})
