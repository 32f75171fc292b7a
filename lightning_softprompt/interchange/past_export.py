"""`to_past`: a prompt as keys and values that other software loads into its cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_softprompt import __version__
from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.checkpoints.folding import fold_task
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.inference.prompt import Prompt
from lightning_softprompt.interchange.peft_export import lead_tokens
from lightning_softprompt.interchange.soft_rows import check_decoder_without_head
from lightning_softprompt.interchange.text_format import text_of_rows
from lightning_softprompt.system.atomic_files import write_file_with, write_folder
from lightning_softprompt.system.printable import printable

SELF = "self"
FILE = "past.safetensors"
CARD = """\
# Keys and values of a soft prompt for {base_model}

`{file}` has the tensors `LAYER.key` and `LAYER.value` [key/value heads, positions, head size] of {count} positions,
after the rotation of positions. The text follows from position {count}. The prompt was trained with Lightning
SoftPrompt {version} on the backbone of the fingerprint `{fingerprint}`.

Template of its rows:

```text
{template}
```

## transformers

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

tokenizer = AutoTokenizer.from_pretrained({base_model!r})
model = AutoModelForCausalLM.from_pretrained({base_model!r}).eval()
past = load_file(FOLDER + "/{file}")
cache = DynamicCache(config=model.config)
for layer in range({layers}):
    cache.update(past[f"{{layer}}.key"][None], past[f"{{layer}}.value"][None], layer)
text = {text!r}.format({columns})
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
stand_ins = torch.zeros(1, cache.get_seq_length(), dtype=torch.long)  # for the positions in the cache
inputs = torch.cat([stand_ins, ids], 1)
answer = model.generate(inputs, attention_mask=torch.ones_like(inputs), past_key_values=cache, max_new_tokens=32,
                        do_sample=False)
print(tokenizer.decode(answer[0, inputs.shape[1] :], skip_special_tokens=True))
```

Fill a new cache for each answer, since `generate` extends it. A static cache must be {count} positions longer.

## ONNX

The tensors are the inputs `past_key_values.LAYER.key` and `past_key_values.LAYER.value` of the first call, with a
leading axis of 1.
"""


@dataclass(frozen=True)
class PastExport:
    """The result of an export.

    Args:
        folder: The folder.
        positions: Number of positions of the keys and values.
        num_lead: How many of them are tokens that the template has before the soft tokens.
    """

    folder: Path
    positions: int
    num_lead: int


def to_past(prompt: Prompt, folder: str | Path, task: str | None = None) -> PastExport:
    """Writes the keys and values of a prompt, and a README.md with the code that loads them in transformers.

    Keys and values are written as they are. Soft tokens, with the tokens that the template has before them, run through
    the backbone once.

    Args:
        prompt: The prompt, of a decoder.
        folder: The folder to write, which must not exist.
        task: The task of a prompt that was trained on several.

    Raises:
        ValueError: If the prompt has no keys and values in every layer, or depends on the row, or the folder exists.
    """
    path = Path(folder).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists; remove it, or choose another folder")
    check_decoder_without_head(prompt, "keys and values", "a cache")
    row_format = prompt.row_format(task)
    soft = fold_task(prompt.method, task)
    lead = [] if soft.tokens is None else lead_tokens(prompt.backbone, row_format)
    tensors = _keys_and_values(soft, prompt.backbone, lead)
    positions = tensors["0.key"].shape[1]
    header = {
        "after_rotation": "true", "first_position": "0", "next_position": str(positions), "dtype": "float32",
        "backbone": prompt.backbone.spec.name, "fingerprint": prompt.backbone.fingerprint(),
        "template": json.dumps(row_format.template),
    }  # fmt: skip
    card = _card(prompt.backbone, row_format, len(lead), positions, len(tensors) // 2)

    def write(draft: Path) -> None:
        write_file_with(draft / FILE, lambda part: save_file(tensors, part, header))
        (draft / "README.md").write_text(card)

    write_folder(path, write)
    return PastExport(path, positions, len(lead))


def _keys_and_values(soft: SoftPrompt, backbone: Backbone, lead: list[int]) -> dict[str, Tensor]:
    """Returns `LAYER.key` and `LAYER.value` [N, P, D] of every layer."""
    if soft.hidden:
        raise ValueError("the prompt enters in the middle of the layers, so lower layers have no keys and values")
    if (soft.tokens is None) == (not soft.kv):
        raise ValueError("either soft tokens or keys and values are written, and the prompt has both or none")
    num_layers = len(backbone.attentions[SELF])
    pairs = _run_tokens(soft, backbone, lead) if soft.tokens is not None else soft.kv[SELF]
    lengths = {key.shape[2] for key, _ in pairs.values()}
    if sorted(pairs) != list(range(num_layers)) or len(lengths) != 1:
        raise ValueError("the prompt must have keys and values of the same length in every layer")
    tensors: dict[str, Tensor] = {}
    for layer in range(num_layers):
        for name, tensor in zip(("key", "value"), pairs[layer], strict=True):
            tensors[f"{layer}.{name}"] = tensor[0].detach().float().cpu().contiguous()
    return tensors


@torch.no_grad()
def _run_tokens(soft: SoftPrompt, backbone: Backbone, lead: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Runs the tokens before the slot and the soft tokens through the backbone."""
    assert soft.tokens is not None
    if soft.blocks is not None and len(soft.blocks) > 1:
        raise ValueError("the soft tokens must be one block, but the template has several {soft}")
    ids = torch.tensor([lead], dtype=torch.long, device=soft.tokens.device)
    inputs = torch.cat([backbone.embed(ids), soft.tokens.to(backbone.model.dtype)], 1)
    model: Any = backbone.model
    cache = model(inputs_embeds=inputs, use_cache=True).past_key_values
    return {number: (layer.keys, layer.values) for number, layer in enumerate(cache.layers)}


def _card(backbone: Backbone, row_format: RowFormat, num_lead: int, positions: int, layers: int) -> str:
    return CARD.format(
        base_model=printable(backbone.spec.name),
        file=FILE,
        count=positions,
        version=__version__,
        fingerprint=backbone.fingerprint(),
        template=printable(row_format.template),
        layers=layers,
        text=text_of_rows(backbone.codec, row_format, num_lead),
        columns=", ".join(f'{name}="..."' for name in row_format.parsed.columns),
    )
