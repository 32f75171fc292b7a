"""`softprompt fold`: a trained prompt without the network that made it."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_softprompt.commands import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.checkpoints.files import SavedPrompt
    from lightning_softprompt.module import SoftPromptModule


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt fold",
        description="Write the soft tokens, keys and values that a trained prompt comes to, without the network that "
        "makes them, for `--model Folded --model.path FILE`. Prompts that depend on the row cannot be folded.",
    )
    parser.add_argument("prompt", type=Path, help="prompt.safetensors or a checkpoint of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to; PROMPT.folded.safetensors unless given")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    out = args.out or args.prompt.with_suffix(".folded.safetensors")
    from lightning_softprompt.checkpoints.files import read_prompt, write_prompt

    try:
        saved = read_prompt(args.prompt)
        folded = fold(rebuilt(saved), saved)
    except ValueError as error:
        raise CommandError(str(error)) from error
    write_prompt(out, folded)
    before, after = (sum(t.numel() for t in prompt.tensors.values()) for prompt in (saved, folded))
    print(f"{out}: {after:,} numbers, where {args.prompt} has {before:,}")
    return 0


def rebuilt(saved: SavedPrompt) -> SoftPromptModule:
    """The method as it was trained, on its backbone.

    Raises:
        ValueError: If the file does not say which method it is of, or the backbone cannot be loaded.
    """
    from lightning.pytorch.cli import instantiate_module

    from lightning_softprompt.module import SoftPromptModule

    if "_class_path" not in saved.method:
        raise ValueError("the file does not say which method it is of")
    kept = {name: value for name, value in saved.method.items() if name not in ("_instantiator", "replicas")}
    module: SoftPromptModule = instantiate_module(SoftPromptModule, kept)  # type: ignore[type-abstract]
    module.configure_model()
    saved.check(module.loaded, Path("the prompt"))
    module.load_state_dict(saved.tensors)
    return module


def fold(module: SoftPromptModule, saved: SavedPrompt) -> SavedPrompt:
    """What `Folded` is built from.

    Raises:
        ValueError: If the prompt is not the same for every row.
    """
    from lightning_softprompt.checkpoints.files import SavedPrompt
    from lightning_softprompt.checkpoints.folding import named, tensors_of

    prompt = module.fold()
    parts = tensors_of(prompt)
    tensors = {named(name): tensor for name, tensor in parts.items()}
    heads = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("readout.")}
    method = {**{name: saved.method.get(name) for name in COMMON}, "_class_path": FOLDED, "blocks": prompt.blocks}
    shapes = {name: list(tensor.shape) for name, tensor in parts.items()}
    return SavedPrompt({**tensors, **heads}, saved.backbone, {**method, "shapes": shapes})


FOLDED = "lightning_softprompt.methods.folded.Folded"
COMMON = ("backbone", "classes", "readout")
