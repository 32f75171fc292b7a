"""The splice compared with a loop, on rows with padding anywhere."""

import pytest
import torch
from torch.testing import assert_close

from lightning_softprompt.backbones.insertion.splice import splice

B, T, H = 5, 9, 3


def splice_loop(embeds, slots, parts, mask):
    """Splices one row: each block is before the token at its slot, or at the end; padding is removed."""
    out = []
    for t in range(T + 1):
        for slot, part in zip(slots.tolist(), parts, strict=False):
            if slot == t:
                out += part
        if t < T and mask[t]:
            out.append(embeds[t])
    return torch.stack(out) if out else torch.zeros(0, H)


@pytest.mark.parametrize("blocks", [None, (2, 1), (1, 0, 4), (0, 0, 3)])
@pytest.mark.parametrize("shared", [False, True])
def test_blocks_are_at_their_slots_and_padding_at_the_end(blocks, shared):
    for _ in range(20):
        embeds, mask = torch.randn(B, T, H), torch.rand(B, T) < 0.7
        slots = torch.randint(0, T + 1, (B, 3))
        tokens = torch.randn(1 if shared else B, sum(blocks or (3,)), H)
        rows = splice(embeds, mask, slots, tokens, blocks)
        parts = [row.split(blocks or (3,)) for row in tokens.expand(B, -1, -1)]
        expected = [splice_loop(embeds[b], slots[b], parts[b], mask[b]) for b in range(B)]
        longest = max(map(len, expected))
        assert rows.embeds.shape == (B, longest, H)
        for b, row in enumerate(expected):
            assert_close(rows.embeds[b, : len(row)], row)
            assert rows.mask[b, : len(row)].all()
            assert rows.mask[b].sum() == len(row)
            assert_close(rows.embeds[b, rows.columns[b][mask[b]]], embeds[b][mask[b]])


def test_without_soft_tokens_only_padding_moves():
    embeds, mask = torch.randn(2, 4, H), torch.tensor([[False, True, True, False], [True, True, True, False]])
    rows = splice(embeds, mask, torch.zeros(2, 1, dtype=torch.long))
    assert_close(rows.embeds[0, :2], embeds[0, 1:3])
    assert_close(rows.embeds[1], embeds[1, :3])
    assert rows.mask.tolist() == [[True, True, False], [True, True, True]]


def test_gradients_reach_every_soft_token_from_every_row():
    tokens = torch.randn(1, 2, H, requires_grad=True)
    embeds, mask = torch.randn(B, T, H), torch.rand(B, T) < 0.7
    splice(embeds, mask, torch.randint(0, T + 1, (B, 1)), tokens).embeds.sum().backward()
    assert_close(tokens.grad, torch.full_like(tokens, B))


def test_more_blocks_than_slots_is_an_error():
    embeds, mask = torch.randn(1, 4, H), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="2 soft blocks require as many slots, but the template has 1"):
        splice(embeds, mask, torch.zeros(1, 1).long(), torch.randn(1, 2, H), (1, 1))
