"""Demonstrations without training: the same logits as their text in front of the row, on every family."""

import pytest
import torch
from tiny import CLASSES, batch_of
from torch.testing import assert_close

from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.methods import InContext

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SHOWN = "a funny dog it was good dull it was bad "  # CLASSES.demonstrations in the template of CLASSES


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "shown"),
    [({"classes": CLASSES}, SHOWN), ({"text": SHOWN}, SHOWN), ({"text": "a film </s> "}, "a film </s> ")],
    ids=["rows", "text", "control_token"],
)
def test_logits_are_those_of_the_text_in_front_of_the_row(backbone, options, shown):
    module = InContext(backbone=backbone.spec, **options)
    module.attach(backbone)
    batch = batch_of(backbone.codec, "{soft}{text} it was {target}")
    with_text = batch_of(backbone.codec, shown + "{text} it was {target}")
    is_target = batch.targets != IGNORE
    assert_close(module(batch)[is_target], backbone(with_text)[is_target], **CLOSE)


def test_without_demonstrations_it_is_refused(backbone):
    with pytest.raises(ValueError, match=r"requires demonstrations; set data.demonstrations"):
        InContext(backbone=backbone.spec).attach(backbone)
