"""Initialization of keys and values."""

import torch

from lightning_softprompt.prompts.kv_prefix import Reparameterized


def test_the_initialization_of_a_network_does_not_depend_on_memory_contents():
    """A solver that reads uninitialized workspace memory returns different last bits from call to call."""
    target, starts = torch.randn(2, 2, 3, 32), []
    for size in range(24):
        memory = [torch.randint(-3, 9, (16,), dtype=torch.int32) for _ in range(size)]
        torch.manual_seed(0)
        prefix = Reparameterized(target.shape, 32, 16)
        del memory
        prefix.fit(target)
        starts.append(prefix.network[-1].weight.detach().clone())
    torch.testing.assert_close(prefix(), target, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(start, starts[0]) for start in starts)
