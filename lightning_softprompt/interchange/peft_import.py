"""`from_peft` and `import_peft`: adapters of HF PEFT as prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.skeleton import Skeleton
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt
from lightning_softprompt.checkpoints.restore import load_method
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.inference.prompt import Prompt
from lightning_softprompt.interchange.adapter_folder import CONFIG, AdapterFolder, read_adapter
from lightning_softprompt.interchange.adapters import KINDS
from lightning_softprompt.interchange.adapters.base import AdapterKind
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.methods.task_data import plain_formats

TEMPLATE = "{text}{target}"


@dataclass(frozen=True)
class ImportedAdapter:
    """An imported adapter.

    Args:
        saved: The contents of its prompt file.
        backbone: Its backbone.
        template: The template of its rows.
    """

    saved: SavedPrompt
    backbone: Backbone
    template: str


def from_peft(
    folder: str | Path,
    backbone: Backbone | None = None,
    template: str | None = None,
    task_names: Sequence[str] = (),
) -> Prompt:
    """Loads an adapter folder of HF PEFT as a prompt, ready to predict and generate.

    Logits, loss and gradients equal those of PEFT on rows without padding. PEFT shifts the positions of padded rows;
    here, rows of a batch do not affect each other.

    Args:
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`, of prompt tuning, P-tuning, prefix
            tuning, multitask prompt tuning, CPT or Cartridge.
        backbone: A loaded backbone to share; None loads the one that the adapter names. For soft tokens, it must be
            loaded with `start_token="none"`, since PEFT puts them before the start token.
        template: How a row is written (default: `{text}{target}`). If it does not begin with `{soft}`, the soft tokens
            and the start token of the tokenizer are put first, as in PEFT.
        task_names: Names of the tasks of multitask prompt tuning (default: their numbers).

    Raises:
        ValueError: If the folder cannot be read, does not match the backbone, or cannot be represented.
    """
    path = Path(folder).expanduser()
    imported = import_adapter(path, backbone=backbone, template=template, task_names=task_names)
    method = cast(SoftPromptModule, load_method(imported.saved, path, imported.backbone))
    row_format = RowFormat(imported.template)
    return Prompt(method, dict.fromkeys(method.tasks or ("",), row_format))


def import_adapter(
    folder: Path,
    spec: BackboneSpec | None = None,
    backbone: Backbone | None = None,
    template: str | None = None,
    task_names: Sequence[str] = (),
) -> ImportedAdapter:
    """Converts an adapter folder to the contents of a prompt file.

    Args:
        folder: The adapter folder.
        spec: How to load the backbone; None takes the name and the revision from the adapter.
        backbone: A loaded backbone instead.
        template: See `from_peft`.
        task_names: See `from_peft`.

    Raises:
        ValueError: See `from_peft`.
    """
    adapter = read_adapter(folder)
    kind = _kind_of(adapter)
    if backbone is None:
        backbone = load_backbone(_with_start_token(spec or _named_backbone(adapter), kind))
    template = _add_start_token(template or TEMPLATE, kind, backbone)
    method = kind.convert(adapter, backbone, task_names)
    if task_names and not method.tasks:
        raise ValueError(f"{folder} has a single task; do not name tasks")
    adapter.check_all_read()
    arguments: dict[str, Any] = {"_class_path": method.class_path, "backbone": vars(backbone.spec), **method.arguments}
    if method.tasks:
        arguments["classes_by_task"] = dict.fromkeys(method.tasks)
    formats = dict.fromkeys(method.tasks or ("",), RowFormat(template))
    saved = SavedPrompt(method.tensors, backbone_identity(backbone), arguments, plain_formats(formats))
    return ImportedAdapter(saved, backbone, template)


def _kind_of(adapter: AdapterFolder) -> AdapterKind:
    """Returns the kind of an adapter.

    Raises:
        ValueError: If adapters of this kind are not prompts.
    """
    supported: list[str] = []
    for kind in KINDS:
        if adapter.peft_type in kind.peft_types:
            return kind
        supported += kind.peft_types
    hint = "; train it here with --model LoRA" if adapter.peft_type == "LORA" else ""
    raise ValueError(
        f"{adapter.path / CONFIG}: peft_type {adapter.peft_type!r} is not a prompt; expected one of "
        f"{', '.join(supported)}{hint}"
    )


def _named_backbone(adapter: AdapterFolder) -> BackboneSpec:
    """Returns the backbone that an adapter names."""
    name, revision = adapter.config.get("base_model_name_or_path"), adapter.config.get("revision")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{adapter.path / CONFIG} does not name its backbone; pass it with --backbone.name")
    return BackboneSpec(name=name, revision=revision if isinstance(revision, str) else None)


def _with_start_token(spec: BackboneSpec, kind: AdapterKind) -> BackboneSpec:
    """Returns a spec with the start token that PEFT uses."""
    if Skeleton(spec).family is not CausalBackbone:
        return spec
    return replace(spec, start_token="none" if kind.precedes_start_token else "tokenizer")


def _add_start_token(template: str, kind: AdapterKind, backbone: Backbone) -> str:
    """Returns a template with the start token of the tokenizer after the soft tokens, as in PEFT.

    Raises:
        ValueError: If the backbone or the template puts text before the soft tokens.
    """
    if not kind.precedes_start_token:
        return template
    Template(template)  # raises an error if it is not valid
    if "{soft}" in template.removeprefix("{soft}"):
        raise ValueError(f"PEFT puts all soft tokens first, so the template must begin with {{soft}}, got {template!r}")
    codec = backbone.codec
    if codec.start:
        names = "".join(codec.tokenizer.convert_ids_to_tokens(list(codec.start)))
        raise ValueError(
            f"rows of {backbone.spec.name} begin with {names!r}, but PEFT puts soft tokens before all others: load "
            "the backbone with start_token='none' (only decoders have this option)"
        )
    if template.startswith("{soft}"):
        return template
    if Skeleton(backbone.spec).family is not CausalBackbone:
        return "{soft}" + template
    start = "".join(codec.tokenizer.convert_ids_to_tokens(list(codec.with_start("tokenizer").start)))
    start = start.replace("{", "{{").replace("}", "}}")
    return "{soft}" + start + template
