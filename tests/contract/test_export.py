"""Every method is either written in a format of other software, with the same logits, or refused in one sentence."""

import pytest

from lightning_softprompt import Prompt, to_peft
from lightning_softprompt.backbones.generation.row_format import RowFormat

FAMILIES = ("llama",)
ROWS = RowFormat("{soft}{text} it was{target}")
REFUSED = {  # methods whose prompt is the same for every row, and how their messages begin
    "p_tuning_v2_last_layer": "PEFT requires keys and values of the same length in every layer",
    "p_tuning_v2_head": "the prompt has a trained classification head",
    "late_free": "the prompt enters in the middle of the layers",
    "combined_prefix": "PEFT supports either soft tokens or keys and values",
}


def test_a_method_is_exported_to_peft_or_refused(request, method, backbone, classes, tmp_path):
    name = request.node.callspec.id.rpartition("-")[0]
    arguments = {"classes": classes} if "readout" in method.arguments else {}
    prompt = Prompt(method.on(backbone, **arguments), {"": ROWS})
    if method.folds and name not in REFUSED:
        export = to_peft(prompt, tmp_path / "adapter")
        assert export.error < 1e-6
        return
    with pytest.raises(ValueError, match=REFUSED.get(name, "cannot be folded")) as error:
        to_peft(prompt, tmp_path / "adapter")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
