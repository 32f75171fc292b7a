"""The text of rows for the code in a README.md of an export."""

from __future__ import annotations

from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.tokenization.codec import Codec


def text_of_rows(codec: Codec, row_format: RowFormat, num_lead: int) -> str:
    """Returns the text of a row until its answer, with columns in braces, for `str.format`.

    Args:
        codec: The codec of the backbone.
        row_format: How rows are written.
        num_lead: Number of tokens before the soft tokens that the export contains. If there are any, the text begins
            after the soft tokens; else it begins with the start token.
    """
    before, _, after = row_format.parsed.text.partition("{target}")[0].rpartition("{soft}")
    text = after.rstrip(" ")
    if num_lead:
        return text
    start = "".join(codec.tokenizer.convert_ids_to_tokens(list(codec.start)))
    return start.replace("{", "{{").replace("}", "}}") + before.replace("{soft}", "") + text
