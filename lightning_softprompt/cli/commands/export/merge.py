"""`softprompt merge`: write the backbone with its trained weights as a plain folder of transformers."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_softprompt.backbones.base import Backbone
    from lightning_softprompt.checkpoints.prompt_file import SavedPrompt
    from lightning_softprompt.core.types import Batch
    from lightning_softprompt.methods.base import SoftPromptModule

TEXT = "The model reads this text, which has 2 sentences. It predicts the next tokens: one, two and three."
NUM_LAST, MAX_TOKENS = 12, 32  # tokens of the rows on which logits are compared
TOLERANCE = 1e-4  # relative to the largest logit; float32
HALF_TOLERANCE = 5e-2


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt merge",
        description="Write the backbone with the trained weights of NewTokens, LoRA or FullFineTuning as a folder that "
        "transformers loads without this package, with its tokenizer. The folder is loaded again, and its logits are "
        "compared. It can be the backbone of the next run. A soft prompt that was trained with the weights is written "
        "into the folder as prompt.safetensors.",
    )
    parser.add_argument("prompt", type=Path, help="prompt.safetensors or a checkpoint of a run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    try:
        error, num_soft = merge(args.prompt, args.out)
    except (ValueError, OSError) as problem:
        raise CommandError(str(problem)) from problem
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"Wrote {args.out}: {size:,} bytes; the logits of transformers differ by {error:.1e} of the largest one")
    if num_soft:
        print(f"Wrote {args.out / PROMPT}: {num_soft:,} parameters of the soft prompt")
        suggest(command_line("test", "--ckpt_path", args.out / PROMPT, "--data", "..."))
    suggest(command_line("fit", "--backbone.name", args.out.absolute(), "..."))
    return 0


def merge(path: Path, folder: Path) -> tuple[float, int]:
    """Writes the backbone of a method with its trained weights.

    Args:
        path: The file of the method.
        folder: The folder to write.

    Returns:
        The largest difference of logits, relative to the largest logit, and the number of parameters of a soft prompt
        that was trained with the weights.

    Raises:
        ValueError: If the method does not change weights, its soft prompt depends on the row, the folder exists, or
            the written model has other logits.
    """
    from lightning_softprompt.backbones.loading import load_backbone
    from lightning_softprompt.checkpoints.folding import compute_shared_prompt
    from lightning_softprompt.checkpoints.prompt_file import read_prompt
    from lightning_softprompt.checkpoints.restore import load_method
    from lightning_softprompt.core.backbone_spec import BackboneSpec
    from lightning_softprompt.system.atomic_files import write_folder

    if folder.exists():
        raise ValueError(f"{folder} exists; remove it, or choose another --out")
    saved = read_prompt(path)
    method = cast("SoftPromptModule", load_method(_with_plain_layers(saved), path))
    backbone = method.loaded
    prompt = None if not method.changes_backbone else compute_shared_prompt(method.prompt, backbone)
    before = compute_logits(backbone, sample_rows(backbone))
    method.merge()

    def write(draft: Path) -> None:
        backbone.model.save_pretrained(draft)
        backbone.codec.tokenizer.save_pretrained(draft)

    write_folder(folder, write)
    spec = replace(BackboneSpec(), dtype=backbone.spec.dtype, start_token=backbone.spec.start_token)
    merged = load_backbone(replace(spec, name=str(folder.absolute()), linear_backend="plain"))
    after = compute_logits(merged, sample_rows(merged))
    error = float((after - before).abs().max() / before.abs().max())
    limit = TOLERANCE if backbone.spec.dtype == "float32" else HALF_TOLERANCE
    if not error <= limit:
        raise ValueError(f"{folder} was written, but its logits differ by {error:.1e} of the largest; do not use it")
    return error, _write_prompt(prompt, saved, merged, folder)


def _with_plain_layers(saved: SavedPrompt) -> SavedPrompt:
    """Returns the description of a method whose backbone keeps its matrices as transformers saves them."""
    spec = dict(saved.method.get("backbone") or {})
    if spec.get("quantization"):
        raise ValueError("quantized weights cannot be merged; train on the backbone without backbone.quantization")
    return replace(saved, method={**saved.method, "backbone": {**spec, "linear_backend": "plain", "compiled": False}})


def sample_rows(backbone: Backbone) -> Batch:
    """Returns two rows of different lengths, one of them with the last tokens of the vocabulary."""
    from lightning_softprompt.core.template import Template

    codec, template = backbone.codec, Template("{text}{target}", ("text",))
    size = len(codec.tokenizer)
    last_tokens = " ".join(str(codec.tokenizer.decode([id])) for id in range(size - NUM_LAST, size))
    fields = [{"text": text} for text in (TEXT, last_tokens)]
    return codec.collate([codec.encode(template.pieces(row), "a", max_tokens=MAX_TOKENS) for row in fields])


def compute_logits(backbone: Backbone, batch: Batch) -> Tensor:
    """Returns the logits of the targets of rows without a prompt; their states if the model has no head."""
    import torch

    with torch.no_grad():
        if backbone.head.headless:
            return backbone.hidden_states(batch)[batch.mask].float()
        return backbone.target_logits(backbone.states(batch), batch).float()


def _write_prompt(prompt: Any, saved: SavedPrompt, merged: Backbone, folder: Path) -> int:
    """Writes the soft prompt that was trained with the weights for the merged backbone; returns its parameters."""
    from dataclasses import asdict

    from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
    from lightning_softprompt.checkpoints.folding import prompt_to_tensors
    from lightning_softprompt.checkpoints.prompt_file import write_prompt
    from lightning_softprompt.cli.commands.fold import file_of_folded

    if prompt is None or not prompt_to_tensors(prompt):
        return 0
    folded = file_of_folded(prompt, saved)
    method = {**folded.method, "backbone": asdict(replace(merged.spec, linear_backend="auto"))}
    write_prompt(folder / PROMPT, replace(folded, backbone=backbone_identity(merged), method=method))
    return sum(tensor.numel() for tensor in prompt_to_tensors(prompt).values())


PROMPT = "prompt.safetensors"
