"""The README.md of a folder with soft tokens in its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_softprompt import __version__
from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.interchange.soft_rows import SoftRows
from lightning_softprompt.system.printable import html_text, one_line, printable

CARD = """\
# Soft prompts in the vocabulary of {backbone}

The model `{backbone}` with {count} new tokens, which hold soft prompts that were trained with Lightning SoftPrompt
{version}. All other weights are unchanged. transformers and servers that load its folders need no further package.

| prompt | tokens | content of the message | further fields |
|---|---|---|---|
{prompts}

## transformers

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, prompt={name}, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Servers with the API of OpenAI

Send `"chat_template_kwargs": {{"prompt": {name}}}` with a chat request; further fields are a mapping,
`"fields": {{"COLUMN": "..."}}`. Or send the complete text to `/v1/completions`:

```text
{text}
```

{head}
The names of the new tokens in the text of a user are new tokens, too, as for all special tokens.
"""
COPY = """\
Each new token has the row of the least likely word in the output head, so it is never the most likely token.
"""
TIED = """\
The output head is shared with the embedding. Without `suppress_tokens` of `generation_config.json`, which transformers
applies, the model generates soft tokens. Other servers require a bias of -100 on each of them in every request.
"""


def vocabulary_card(rows: Sequence[SoftRows], ids: Mapping[str, range], backbone: Backbone, head: str) -> str:
    """Returns the README.md; texts from files are escaped.

    Args:
        rows: The prompts.
        ids: The ids of their tokens.
        backbone: Their backbone.
        head: How the output head was extended: `copy` or `tied`.
    """
    lines = []
    for of_prompt in rows:
        token_ids = ids[of_prompt.name]
        others = [name for name in of_prompt.row_format.parsed.columns if name != of_prompt.message_column]
        cells = (of_prompt.name, f"{token_ids.start} to {token_ids[-1]}", of_prompt.message_column, ", ".join(others))
        lines.append("| " + " | ".join(html_text(one_line(cell)) for cell in cells) + " |")
    columns = rows[0].row_format.parsed.columns
    text = rows[0].text(backbone.codec, {name: f"{{{name}}}" for name in columns})
    return CARD.format(
        backbone=printable(one_line(backbone.spec.name)).replace("`", ""),
        version=__version__,
        count=sum(map(len, ids.values())),
        prompts="\n".join(lines),
        name=f'"{rows[0].name}"',
        text=printable(text).replace("```", ""),
        head=TIED if head == "tied" else COPY,
    )
