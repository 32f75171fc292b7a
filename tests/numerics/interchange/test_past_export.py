"""The code in the README.md of exported keys and values generates the answers of the prompt."""

import re

import pytest
import torch
from safetensors import safe_open

from lightning_softprompt import Prompt, methods
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.interchange.past_export import to_past
from lightning_softprompt.methods.optimizers import trainable_parameters

ROWS = RowFormat("it is {soft}{text} :{target}")
TEXT = "a warm and funny film"


def make_prompt(backbone, method_class, row_format=ROWS, **arguments):
    torch.manual_seed(0)
    method = method_class(backbone=backbone.spec, **arguments)
    method.attach(backbone)
    for parameter in trainable_parameters(method).values():
        torch.nn.init.normal_(parameter.data, std=0.5)
    return Prompt(method, {"": row_format})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("method_class", "arguments", "positions"),
    [(methods.PromptTuning, {"length": 3}, 6), (methods.PTuningV2, {"length": 4}, 4)],
)
def test_the_code_of_the_readme_generates_the_same_answer(
    load_once, family, method_class, arguments, positions, tmp_path, capsys
):
    prompt = make_prompt(load_once(family), method_class, **arguments)
    export = to_past(prompt, tmp_path / "past")
    assert export.positions == positions
    with safe_open(export.folder / "past.safetensors", framework="pt") as file:
        assert file.metadata()["next_position"] == str(positions)
        assert file.metadata()["fingerprint"] == prompt.backbone.fingerprint()
    code = re.search(r"```python\n(.*?)```", (export.folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace('text="..."', f"text={TEXT!r}").replace("max_new_tokens=32", "max_new_tokens=8")
    exec(code, {"FOLDER": str(export.folder)})
    expected = prompt.generate(TEXT, max_new_tokens=8)[0]
    assert capsys.readouterr().out.strip() == expected
    assert expected


REFUSED = [
    (methods.PromptTuning, {"length": 2}, RowFormat("{text}{soft} :{target}"), "column 'text' before {soft}"),
    (methods.PTuningV2, {"length": 2, "layers": [1]}, ROWS, "in every layer"),
    (methods.LatePromptTuning, {"length": 2, "layer": 1, "generator": "free"}, ROWS, "in the middle of the layers"),
    (methods.SMoP, {"length": 2}, ROWS, "computed from each row"),
    (methods.PTuning, {"blocks": [1, 2]}, RowFormat("{soft}it{soft}{text} :{target}"), "one block"),
]


@pytest.mark.parametrize(("method_class", "arguments", "row_format", "message"), REFUSED)
def test_other_prompts_are_refused(load_once, method_class, arguments, row_format, message, tmp_path):
    prompt = make_prompt(load_once("llama"), method_class, row_format, **arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        to_past(prompt, tmp_path / "past")
    assert list(tmp_path.iterdir()) == []
