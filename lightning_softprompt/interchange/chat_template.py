"""The chat template of a folder with soft tokens: it writes the row of a prompt that a request names."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.interchange.soft_rows import SoftRows

HEAD = "{%%- set name = prompt | default(%s) -%%}\n{%%- set fields = fields | default({}) -%%}\n"
UNKNOWN = '{%- else -%}{{ raise_exception("unknown prompt " ~ name ~ "; the prompts are " ~ '
MISSING = 'raise_exception("missing field " ~ %s)'


def chat_template(prompts: Sequence[SoftRows], codec: Codec) -> str:
    """Returns a Jinja template in the syntax of transformers.

    The content of the last message is the main column. The name of the prompt is the variable `prompt`, the other
    columns are in the mapping `fields`; requests set both with `chat_template_kwargs`. The first prompt is the default.

    Args:
        prompts: The prompts.
        codec: The codec of their backbone.
    """
    branches = []
    for number, rows in enumerate(prompts):
        keyword = "elif" if number else "if"
        branches.append(f"{{%- {keyword} name == {_literal(rows.name)} -%}}{{{{ {_row(rows, codec)} }}}}")
    names = _literal(", ".join(rows.name for rows in prompts))
    head = HEAD % _literal(prompts[0].name)
    return head + "\n".join(branches) + f"\n{UNKNOWN}{names}) }}}}\n{{%- endif -%}}"


def _row(rows: SoftRows, codec: Codec) -> str:
    """The expression of a row until its answer."""
    expressions = []
    for text, is_column in rows.parts(codec):
        if is_column and text == rows.message_column:
            expressions.append('messages[-1]["content"]')
        elif is_column:
            expressions.append(_field(text, rows))
        elif text:
            expressions.append(_literal(text))
    return " ~ ".join(expressions)


def _field(column: str, rows: SoftRows) -> str:
    default = rows.row_format.defaults.get(column)
    missing = MISSING % _literal(column) if default is None else _literal(default)
    return f"(fields[{_literal(column)}] if {_literal(column)} in fields else {missing})"


def _literal(text: str) -> str:
    """A text as a literal of Jinja, which reads escapes as Python does."""
    return json.dumps(text, ensure_ascii=False)
