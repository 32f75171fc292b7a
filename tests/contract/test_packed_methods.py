"""Every method gives the same loss and gradients on packed rows as on padded rows, in float64.

Only causal backbones pack rows. The others have one path, so there is nothing to compare.
"""

import pytest
import torch
from tiny import CAUSAL, TEMPLATES, batch_of, real
from torch.testing import assert_close

from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.objectives.language_modeling import LanguageModeling

FAMILIES = CAUSAL
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def loss_and_gradients(module, batch):
    loss = LanguageModeling()(module.lm(), batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in trainable_parameters(module).items()}


@pytest.mark.rotate(template=TEMPLATES, grouping=["one group", "groups", "groups with copied prefix"])
def test_packed_rows_give_the_loss_and_gradients_of_padded_rows(method, pair, template):
    packed, padded = (method.on(backbone).double() for backbone in pair)
    padded.load_state_dict(packed.state_dict())
    batch = batch_of(pair[0].codec, TEMPLATES[template])
    assert_close(loss_and_gradients(packed, batch), loss_and_gradients(padded, batch), **EXACT)
    with torch.no_grad():
        assert_close(real(batch, packed(batch)), real(batch, padded(batch)), **EXACT)
