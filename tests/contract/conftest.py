"""Backbones for the tests of exactness."""

from functools import partial

import pytest
from exact import rms_norm

from lightning_softprompt.backbones.execution import packing

GROUPINGS = {  # GROUP_OVERHEAD and MAX_COPIES_PER_TOKEN: how packed attention groups rows
    "one group": (packing.GROUP_OVERHEAD, 0),
    "groups": (0, 0),
    "groups with copied prefix": (0, 1000),
}


def pytest_generate_tests(metafunc):
    """Run tests of `pair` in every grouping, except those of methods that rotate the groupings."""
    rotation = metafunc.definition.get_closest_marker("rotate")
    if "grouping" in metafunc.fixturenames and rotation is None:
        metafunc.parametrize("grouping", GROUPINGS)


@pytest.fixture
def pair(load, family, grouping, monkeypatch):
    """Two backbones with the same weights in float64: one packs rows, in one of the groupings; the other pads them."""
    group_overhead, max_copies = GROUPINGS[grouping]
    monkeypatch.setattr(packing, "GROUP_OVERHEAD", group_overhead)
    monkeypatch.setattr(packing, "MAX_COPIES_PER_TOKEN", max_copies)
    backbones = load(family).double(), load(family, packed=False).double()
    for backbone in backbones:
        for module in backbone.modules():
            if type(module).__name__ == "LlamaRMSNorm":  # transformers computes it in float32 for any input
                module.forward = partial(rms_norm, module)
    return backbones
