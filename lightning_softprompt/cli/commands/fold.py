"""`softprompt fold`: export a trained prompt as plain tensors, without its reparameterization network."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_softprompt.checkpoints.prompt_file import SavedPrompt
    from lightning_softprompt.checkpoints.restore import LoadedMethod
    from lightning_softprompt.core.types import SoftPrompt


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt fold",
        description="Export the soft tokens, keys and values of a trained prompt as plain tensors, without its "
        "reparameterization network, for `--model Folded --model.path FILE`. Input-dependent prompts cannot be folded.",
    )
    parser.add_argument("prompt", type=Path, help="prompt.safetensors or a checkpoint of a run")
    parser.add_argument("--task", metavar="NAME", help="task to export (multi-task prompts)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="output file (default: PROMPT.folded.safetensors)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    out = args.out or args.prompt.with_suffix(".folded.safetensors")
    from lightning_softprompt.checkpoints.prompt_file import read_prompt, write_prompt
    from lightning_softprompt.checkpoints.restore import load_method
    from lightning_softprompt.cli.run_config import config_beside

    try:
        saved = read_prompt(args.prompt)
        folded = fold(load_method(saved, args.prompt), saved, args.task)
    except ValueError as error:
        raise CommandError(str(error)) from error
    write_prompt(out, folded)
    before, after = (sum(t.numel() for t in prompt.tensors.values()) for prompt in (saved, folded))
    print(f"Wrote {out}: {after:,} parameters ({args.prompt}: {before:,})")
    if after > before:
        print("The file is larger: the method computes its prompt from fewer parameters, with a network or factors")
    config = config_beside(args.prompt)
    if args.task is None and config is not None:  # one task of several requires another data module
        suggest(command_line("test", "--config", config, "--model", "Folded", "--model.path", out.absolute()))
    return 0


def fold(module: LoadedMethod, saved: SavedPrompt, task: str | None = None) -> SavedPrompt:
    """Materialize a prompt for `Folded`, optionally that of one task.

    Raises:
        ValueError: If the prompt is not the same for every row, there is no such task, or a task is required.
    """
    from lightning_softprompt.checkpoints.folding import fold_task

    return file_of_folded(fold_task(module, task), saved, task)


def file_of_folded(prompt: SoftPrompt, saved: SavedPrompt, task: str | None = None) -> SavedPrompt:
    """The file of a prompt that is the same for every row, with the readout and the rows of another file.

    Raises:
        ValueError: If the prompt is not the same for every row.
    """
    from lightning_softprompt.checkpoints.folding import parameter_name, prompt_to_tensors

    parts = prompt_to_tensors(prompt)
    tensors = {parameter_name(name): tensor for name, tensor in parts.items()}
    method = {**_read_by(saved, task), "_class_path": FOLDED, "blocks": prompt.blocks}
    shapes = {name: list(tensor.shape) for name, tensor in parts.items()}
    rows = saved.rows if task is None or task not in saved.rows else {"": saved.rows[task]}
    method["shapes"] = shapes
    return replace(saved, tensors={**tensors, **_heads(saved, task)}, method=method, rows=rows)


def _read_by(saved: SavedPrompt, task: str | None) -> dict[str, Any]:
    """The arguments that determine how answers are read, restricted to a task if given."""
    arguments = {name: saved.method.get(name) for name in COMMON}
    if task is None:
        return arguments
    return {**arguments, "classes": saved.method["classes_by_task"][task], "classes_by_task": None}


def _heads(saved: SavedPrompt, task: str | None) -> dict[str, Tensor]:
    """The trained parameters of the readout."""
    of_task = READOUT if task is None else f"{READOUT}of_tasks.{task}."
    heads = {name: tensor for name, tensor in saved.tensors.items() if name.startswith(of_task)}
    return {READOUT + name.removeprefix(of_task): tensor for name, tensor in heads.items()}


READOUT = "readout."
FOLDED = "lightning_softprompt.methods.trained.folded.Folded"
COMMON = ("backbone", "classes", "classes_by_task", "readout")
