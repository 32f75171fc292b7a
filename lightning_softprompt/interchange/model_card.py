"""The README.md of an exported prompt."""

from __future__ import annotations

from lightning_softprompt import __version__
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.seq2seq import Seq2SeqBackbone
from lightning_softprompt.inference.prompt import Prompt
from lightning_softprompt.interchange.text_format import text_of_rows
from lightning_softprompt.system.printable import printable

PEFT_CARD = """\
---
base_model: {base_model}
library_name: peft
---

# {method} prompt for {base_model}

A soft prompt that was trained with Lightning SoftPrompt {version}.

* Backbone: `{trained_on}`{revision}, fingerprint `{fingerprint}`. The prompt only works with these weights.
* Virtual tokens: {num_virtual_tokens}{lead}
{classes}
Template of its rows:

```text
{template}
```

## Use

```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base_model!r})
model = PeftModel.from_pretrained({auto}.from_pretrained({base_model!r}), FOLDER).eval()
text = {text!r}.format({columns})
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=32)
```

Pass `add_special_tokens=False`: the start token is {start}.

Run one row at a time, or rows of the same length. PEFT shifts the positions of padded rows, which changes their logits.
"""


def peft_card(prompt: Prompt, row_format: RowFormat, num_lead: int, num_virtual_tokens: int, base_model: str) -> str:
    """Returns the README.md of an adapter folder of PEFT.

    Args:
        prompt: The prompt.
        row_format: How its rows are written.
        num_lead: Number of virtual tokens that are tokens of the template.
        num_virtual_tokens: Number of all virtual tokens.
        base_model: Name or folder of the backbone in transformers.
    """
    backbone = prompt.backbone
    template = row_format.parsed
    is_encoder_decoder = type(backbone) is Seq2SeqBackbone
    text = text_of_rows(backbone.codec, row_format, num_lead)
    lead = f", of which the first {num_lead} stand for tokens of the template" if num_lead else ""
    classes = ""
    if prompt.method.classes is not None:
        words = [f"{name}: {', '.join(map(repr, words))}" for name, words in prompt.method.classes.words.items()]
        classes = f"* Answers of each class: {'; '.join(words)}\n"
    return PEFT_CARD.format(
        base_model=printable(base_model),
        trained_on=printable(backbone.spec.name),
        method=type(prompt.method).__name__,
        version=__version__,
        revision=f" at revision `{printable(backbone.spec.revision)}`" if backbone.spec.revision else "",
        fingerprint=backbone.fingerprint(),
        template=printable(template.text),
        num_virtual_tokens=num_virtual_tokens,
        lead=lead,
        classes=classes,
        auto="AutoModelForSeq2SeqLM" if is_encoder_decoder else "AutoModelForCausalLM",
        text=text,
        columns=", ".join(f'{name}="..."' for name in template.columns),
        start="one of the virtual tokens" if num_lead else "part of the text, if there is one",
    )
