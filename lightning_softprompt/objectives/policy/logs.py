"""Values that objectives of sampled answers log."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_softprompt.objectives.policy.estimators import Divergences, estimate_divergences, sum_tokens


def divergence_logs(divergences: Divergences, mask: Tensor) -> dict[str, Tensor]:
    """Returns the mean divergence from the reference per answer; `kl`, the estimate without bias, can be negative."""
    k1, k3 = (sum_tokens(values.detach(), mask).mean() for values in (divergences.k1, divergences.k3))
    return {"kl": k1, "kl_k3": k3}


@torch.no_grad()
def change_logs(
    logprobs: Tensor, old_logprobs: Tensor, entropies: Tensor, ratio: Tensor, clipped: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """Returns how much the policy has changed since it sampled the answers, and its entropy per token.

    Args:
        logprobs: Log-probabilities [B, U] of the tokens.
        old_logprobs: Log-probabilities [B, U] of the policy that sampled the answers.
        entropies: Entropies [B, U] of the policy.
        ratio: Probability ratios [B, U] of tokens, or [B, 1] of answers.
        clipped: Which ratios are clipped, of the same shape.
        mask: Which tokens [B, U] are learned from.
    """
    tokens = mask.sum().clamp(min=1)
    used = mask if ratio.shape == mask.shape else mask.any(1, keepdim=True)
    change = estimate_divergences(old_logprobs, logprobs).k3
    return {
        "policy_change": sum_tokens(change, mask).mean(),
        "ratio_deviation": (ratio - 1).abs().where(used, 0).max(),
        "clip_share": (clipped & used).sum() / used.sum().clamp(min=1),
        "entropy": entropies.where(mask, 0).sum() / tokens,
    }
