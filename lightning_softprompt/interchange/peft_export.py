"""`to_peft`: a prompt as an adapter folder of HF PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.seq2seq import Seq2SeqBackbone
from lightning_softprompt.checkpoints.folding import fold_task
from lightning_softprompt.core.types import Encoded, Slot, SoftPrompt
from lightning_softprompt.inference.prompt import Prompt
from lightning_softprompt.interchange.adapter_folder import EMBEDDINGS, write_adapter
from lightning_softprompt.interchange.model_card import peft_card

SELF = "self"
TEXT, ANSWER = "The text of a row.", "An answer."  # of the row on which logits are compared
TOLERANCE = 1e-5  # relative to the largest logit; float32
TASK_TYPES: dict[type[Backbone], str] = {CausalBackbone: "CAUSAL_LM", Seq2SeqBackbone: "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class PeftAdapter:
    """The contents of an adapter folder.

    Args:
        config: The values of `adapter_config.json`.
        embeddings: The tensor `prompt_embeddings`.
        num_lead: Number of tokens before the soft tokens, whose embeddings come first; 0 for keys and values.
    """

    config: Mapping[str, Any]
    embeddings: Tensor
    num_lead: int


@dataclass(frozen=True)
class PeftExport:
    """The result of an export.

    Args:
        folder: The adapter folder.
        num_virtual_tokens: Its number of virtual tokens.
        num_lead: How many of them are the tokens that the template has before the soft tokens.
        error: Largest difference of logits from PEFT, relative to the largest logit; None without the package peft.
    """

    folder: Path
    num_virtual_tokens: int
    num_lead: int
    error: float | None


def to_peft(prompt: Prompt, folder: str | Path, task: str | None = None, base_model: str | None = None) -> PeftExport:
    """Writes a prompt as an adapter folder that `PeftModel.from_pretrained` loads.

    Soft tokens become prompt tuning, and keys and values prefix tuning. PEFT puts virtual tokens before the text.
    Therefore, tokens that the template has before the soft tokens, such as a start token, also become virtual tokens,
    and the text is tokenized without them, as the README.md of the folder shows. If the package peft is installed, the
    folder is loaded, and its logits are compared.

    Args:
        prompt: The prompt.
        folder: The folder to write, which must not exist.
        task: The task of a prompt that was trained on several.
        base_model: Name or folder by which transformers loads the backbone (default: that of the training).

    Raises:
        ValueError: If PEFT cannot represent the prompt, the folder exists, or PEFT computes other logits.
    """
    path = Path(folder).expanduser()
    row_format = prompt.row_format(task)
    soft = fold_task(prompt.method, task)
    adapter = convert_prompt(soft, prompt, row_format)
    name = base_model or prompt.backbone.spec.name
    config = {**adapter.config, "base_model_name_or_path": name}
    card = peft_card(prompt, row_format, adapter.num_lead, config["num_virtual_tokens"], name)
    write_adapter(path, config, {EMBEDDINGS: adapter.embeddings}, card)
    error = None
    if find_spec("peft") is not None:
        try:
            error = compare_with_peft(path, prompt.backbone, soft, row_format, adapter.num_lead)
            if not error <= TOLERANCE:
                raise ValueError(f"PEFT computes other logits: they differ by {error:.1e} of the largest one")
        except BaseException:
            shutil.rmtree(path)
            raise
    return PeftExport(path, adapter.config["num_virtual_tokens"], adapter.num_lead, error)


def convert_prompt(soft: SoftPrompt, prompt: Prompt, row_format: RowFormat) -> PeftAdapter:
    """Returns the adapter of a prompt that all rows share.

    Raises:
        ValueError: If PEFT cannot represent it.
    """
    backbone = prompt.backbone
    if type(backbone) not in TASK_TYPES:
        raise ValueError(
            "PEFT puts virtual tokens before the start token of encoders, so their prompts have no adapter"
        )
    if any(name.startswith("readout.") for name in prompt.method.state_dict()):
        raise ValueError("the prompt has a trained classification head, which adapters of language models do not have")
    if soft.hidden:
        raise ValueError("the prompt enters in the middle of the layers, which PEFT does not support")
    if (soft.tokens is None) == (not soft.kv):
        raise ValueError("PEFT supports either soft tokens or keys and values, and the prompt has both or none")
    common = {
        "task_type": TASK_TYPES[type(backbone)],
        "revision": backbone.spec.revision,
        "inference_mode": True,
        "auto_mapping": None,
        "modules_to_save": None,
    }
    if soft.tokens is None:
        return _prefix_adapter(soft, backbone, common)
    return _token_adapter(soft, backbone, row_format, common)


def _token_adapter(
    soft: SoftPrompt, backbone: Backbone, row_format: RowFormat, common: Mapping[str, Any]
) -> PeftAdapter:
    """Returns prompt tuning: the embeddings of the tokens before the soft tokens, then the soft tokens."""
    assert soft.tokens is not None
    if soft.blocks is not None and len(soft.blocks) > 1:
        raise ValueError("PEFT has one block of soft tokens, but the template has several {soft}")
    lead = lead_tokens(backbone, row_format)
    with torch.no_grad():
        lead_embeds = backbone.embed(torch.tensor([lead], dtype=torch.long, device=soft.tokens.device))
        rows = torch.cat([lead_embeds.float(), soft.tokens.float()], 1)[0]
    length, copies = len(rows), 1
    if type(backbone) is Seq2SeqBackbone:  # PEFT also saves tokens of the decoder, which it does not use
        rows, copies = torch.cat([rows, torch.zeros_like(rows)]), 2
    model_config = backbone.model.config.get_text_config()
    config = {
        **common,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "num_virtual_tokens": length,
        "num_transformer_submodules": copies,
        "token_dim": backbone.hidden_size,
        "num_attention_heads": model_config.num_attention_heads,
        "num_layers": model_config.num_hidden_layers,
    }
    return PeftAdapter(config, rows, len(lead))


def _prefix_adapter(soft: SoftPrompt, backbone: Backbone, common: Mapping[str, Any]) -> PeftAdapter:
    """Returns prefix tuning: row p has the key and the value of each layer at position p."""
    if type(backbone) is not CausalBackbone:
        raise ValueError(
            "prefixes of PEFT shift the positions of encoder-decoders; only those of decoders are exported"
        )
    sites, layers = backbone.attentions[SELF], soft.kv[SELF]
    lengths = {key.shape[2] for key, _ in layers.values()}
    if sorted(layers) != list(range(len(sites))) or len(lengths) != 1:
        raise ValueError("PEFT requires keys and values of the same length in every layer")
    by_slot = []
    for layer in range(len(sites)):
        by_slot += [tensor[0] for tensor in layers[layer]]  # [N, P, D]
    rows = torch.stack(by_slot).permute(2, 0, 1, 3).flatten(1).float()  # [P, 2 L N D]
    config = {
        **common,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "encoder_hidden_size": None,
        "num_virtual_tokens": len(rows),
        "num_transformer_submodules": 1,
        "token_dim": sites.heads * sites.size,
        "num_attention_heads": sites.heads,
        "num_layers": len(sites),
    }
    return PeftAdapter(config, rows, 0)


def lead_tokens(backbone: Backbone, row_format: RowFormat) -> list[int]:
    """Returns the tokens of every row before its soft tokens.

    Raises:
        ValueError: If they differ between rows, since a column precedes the soft tokens.
    """
    template = row_format.parsed
    pieces = template.pieces(dict.fromkeys(template.columns, TEXT))
    slot = next(index for index, piece in enumerate(pieces) if isinstance(piece, Slot))
    columns = [name for name in template.piece_columns[:slot] if name is not None]
    if columns:
        raise ValueError(
            f"soft tokens must precede the text, but the template has the column {columns[0]!r} before {{soft}}"
        )
    row = _encode_row(backbone, row_format)
    return list(row.ids[: row.slots[0]])


def _encode_row(backbone: Backbone, row_format: RowFormat) -> Encoded:
    return row_format.encode(backbone.codec, dict.fromkeys(row_format.parsed.columns, TEXT), ANSWER)


@torch.no_grad()
def compare_with_peft(
    folder: Path, backbone: Backbone, soft: SoftPrompt, row_format: RowFormat, num_lead: int
) -> float:
    """Returns the largest difference of the logits of PEFT, relative to the largest logit.

    Args:
        folder: The adapter folder.
        backbone: The backbone.
        soft: The prompt.
        row_format: How its rows are written.
        num_lead: Number of tokens before the soft tokens.
    """
    from peft import PeftModel

    row = _encode_row(backbone, row_format)
    batch = backbone.codec.collate([row]).to(backbone.word_embeddings.device)
    expected = backbone(batch, soft)[0]
    model = cast(Any, PeftModel.from_pretrained(backbone.model, folder)).eval()
    ids = torch.tensor([row.ids[num_lead:]], device=expected.device)
    if type(backbone) is Seq2SeqBackbone:
        logits = model(input_ids=ids, labels=batch.targets).logits[0]
    else:
        all_logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        start = len(all_logits) - len(row.ids)  # virtual tokens before the text, without the lead
        logits = all_logits[[start + position - 1 for position in row.answers]]
    return float((logits - expected).abs().max() / expected.abs().max())
