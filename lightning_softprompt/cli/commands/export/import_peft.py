"""`softprompt import-peft`: an adapter of HF PEFT as a prompt file."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.system.errors import CommandError

DESCRIPTION = """\
Convert an adapter folder of HF PEFT (adapter_config.json, adapter_model.safetensors) to a prompt file. Logits, loss and
gradients equal those of PEFT on rows without padding.

  softprompt import-peft ADAPTER                                          the backbone that the adapter names
  softprompt import-peft ADAPTER --backbone.name FOLDER --template "{text}\\nLabel: {target}"

Prompt tuning, P-tuning, CPT         soft tokens, as Folded
Prefix tuning, Cartridge             keys and values, as Folded (decoders only)
Multitask prompt tuning              MPT with all tasks

A template that does not begin with {soft} gets the soft tokens and the start token of the tokenizer first, as in PEFT.
Adapters of `softprompt export` have the start token among their virtual tokens: write {soft} for them.

The prompt file can be tested, used and trained further. Other adapters, such as LoRA, are refused.
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt import-peft", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, metavar="FOLDER", help="adapter folder of PEFT")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: FOLDER/prompt.safetensors)")
    parser.add_argument(
        "--backbone.name", dest="backbone", metavar="NAME", help="backbone (default: the one that the adapter names)"
    )
    parser.add_argument("--backbone.revision", dest="revision", metavar="REVISION", help="its revision")
    parser.add_argument("--template", metavar="TEXT", help="how a row is written (default: {text}{target})")
    parser.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="name of each task, in order (multitask prompts)"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.revision is not None and args.backbone is None:
        raise CommandError("--backbone.revision requires --backbone.name")
    from lightning_softprompt.checkpoints.prompt_file import write_prompt
    from lightning_softprompt.core.backbone_spec import BackboneSpec
    from lightning_softprompt.interchange.peft_import import import_adapter

    spec = None if args.backbone is None else BackboneSpec(name=args.backbone, revision=args.revision)
    out = args.out or args.adapter / "prompt.safetensors"
    try:
        imported = import_adapter(args.adapter, spec=spec, template=args.template, task_names=args.task)
        write_prompt(out, imported.saved)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    count = sum(tensor.numel() for tensor in imported.saved.tensors.values())
    print(f"Wrote {out}: {count:,} parameters on {imported.backbone.spec.name}, template {imported.template!r}")
    suggest(command_line("test", "--ckpt_path", out, "--data", "..."))
    return 0
