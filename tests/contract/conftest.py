"""Backbones for the tests of exactness."""

from functools import partial

import pytest
from exact import rms_norm

from lightning_softprompt.backbones import packing


@pytest.fixture(params=[packing.GROUP, 0], ids=["together", "in groups"])
def pair(load, family, request, monkeypatch):
    """The same weights packed and padded, in float64; attention takes rows together, or those of like length."""
    monkeypatch.setattr(packing, "GROUP", request.param)
    both = load(family).double(), load(family, packed=False).double()
    for backbone in both:
        for module in backbone.modules():
            if type(module).__name__ == "LlamaRMSNorm":  # it computes in float32 whatever it is given
                module.forward = partial(rms_norm, module)
    return both
