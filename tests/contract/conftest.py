"""Backbones for the tests of exactness."""

from functools import partial

import pytest
from exact import rms_norm

from lightning_softprompt.backbones.execution import packing

WAYS = {"together": (packing.GROUP_OVERHEAD, 0), "in groups": (0, 0), "in groups, behind copies": (0, 1000)}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def pair(load, family, request, monkeypatch):
    """The same weights packed and padded, in float64; by what attention takes together."""
    for name, value in zip(("GROUP_OVERHEAD", "MAX_COPIES_PER_TOKEN"), request.param, strict=True):
        monkeypatch.setattr(packing, name, value)
    both = load(family).double(), load(family, packed=False).double()
    for backbone in both:
        for module in backbone.modules():
            if type(module).__name__ == "LlamaRMSNorm":  # it computes in float32 whatever it is given
                module.forward = partial(rms_norm, module)
    return both
