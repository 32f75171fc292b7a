"""How much attention the positions that predict an answer pay to soft tokens and to groups of text."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.insertion.attention_probe import AttentionProbe
from lightning_softprompt.core.types import Batch, SoftPrompt

SOFT = 0  # the group of soft tokens, and of keys and values of a prompt


@torch.no_grad()
def measure_attention(
    backbone: Backbone, batch: Batch, prompt: SoftPrompt | None, groups: Tensor, num_groups: int
) -> Tensor:
    """Computes the attention mass [layers, B, U, heads, G] from the position of each target to groups of tokens.

    Masses are sums of attention probabilities, which add up to 1 over the groups. In an encoder-decoder model, they are
    those of the decoder's attention to the input. Attention shows where a token looks, not what determines its output:
    compare it with a control, such as swapped passages, before you interpret it.

    Args:
        backbone: The backbone.
        batch: The rows, of B rows with U targets and T input tokens.
        prompt: The prompt, whose soft tokens and keys are group `SOFT`.
        groups: The group of each input token [B, T].
        num_groups: G, the number of groups.

    Raises:
        ValueError: If a group is not a number from 0 to G - 1, or the attentions of the backbone cannot be measured.
    """
    if groups.shape != batch.input_ids.shape or groups.min() < 0 or groups.max() >= num_groups:
        raise ValueError(
            f"groups must be numbers from 0 to {num_groups - 1} of shape {list(batch.input_ids.shape)}, got "
            f"{int(groups.min())} to {int(groups.max())} of shape {list(groups.shape)}"
        )
    sites = backbone.attentions[backbone.probed_attentions]
    layers = {module: number for number, module in enumerate(sites.modules)}
    probe = AttentionProbe(layers, num_groups, SOFT)
    backbone.run_probed(probe, batch, prompt, groups)
    missing = [number for number in range(len(layers)) if number not in probe.masses]
    if missing:
        raise ValueError(f"the attention of the layers {missing} of {backbone.spec.name} cannot be measured")
    return torch.stack([probe.masses[number] for number in range(len(layers))])
