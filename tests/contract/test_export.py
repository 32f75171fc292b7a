"""Every method is either written in a format of other software, with the same logits, or refused in one sentence."""

import pytest

from lightning_softprompt import Prompt, to_peft, to_vocabulary
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.interchange import vocabulary_check

FAMILIES = ("llama",)
ROWS = RowFormat("{soft}{text} it was{target}")
REFUSED = {  # methods whose prompt is the same for every row, and how their messages begin
    "p_tuning_v2_last_layer": "PEFT requires keys and values of the same length in every layer",
    "p_tuning_v2_head": "the prompt has a trained classification head",
    "late_free": "the prompt enters in the middle of the layers",
    "combined_prefix": "PEFT supports either soft tokens or keys and values",
}
KEYS_OR_LAYERS = "only soft tokens at the input become rows of the vocabulary"
NOT_ROWS = {  # methods with a shared prompt that is not made of soft tokens only, and how their messages begin
    "prefix_tuning": KEYS_OR_LAYERS,
    "prefix_tuning_free": KEYS_OR_LAYERS,
    "p_tuning_v2": KEYS_OR_LAYERS,
    "p_tuning_v2_last_layer": KEYS_OR_LAYERS,
    "p_tuning_v2_head": "the prompt has a trained classification head",
    "late_free": KEYS_OR_LAYERS,
    "combined_prefix": KEYS_OR_LAYERS,
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


def test_a_method_becomes_rows_of_the_vocabulary_or_is_refused(
    request, method, backbone, classes, tmp_path, monkeypatch
):
    name = request.node.callspec.id.rpartition("-")[0]
    arguments = {"classes": classes} if "readout" in method.arguments else {}
    prompt = Prompt(method.on(backbone, **arguments), {"": ROWS})
    monkeypatch.setattr(vocabulary_check, "NEW_TOKENS", 3)
    if method.folds and name not in NOT_ROWS:
        check = to_vocabulary({"one": prompt}, tmp_path / "folder", max_probability=1.0).checks["one"]
        assert check.logits < 3e-6
        assert check.equal_answers == check.answers
        return
    with pytest.raises(ValueError, match=NOT_ROWS.get(name, "cannot be folded")) as error:
        to_vocabulary({"one": prompt}, tmp_path / "folder", max_probability=1.0)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
