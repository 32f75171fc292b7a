"""`softprompt export`: a trained prompt in the format of other software."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from lightning_softprompt.system.errors import CommandError

DESCRIPTION = """\
Write a trained prompt in the format of other software.

  softprompt export RUN/prompt.safetensors --format peft --out ADAPTER

peft    an adapter folder of HF PEFT: soft tokens as prompt tuning, keys and values as prefix tuning. PEFT puts its
        virtual tokens before the text; its README.md shows how to tokenize the text. If the package peft is installed,
        the folder is loaded and its logits are compared.

Prompts that the format cannot represent are refused, such as prompts that depend on the row.
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt export", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("prompt", type=Path, help="prompt.safetensors or a checkpoint of a run")
    parser.add_argument("--format", choices=["peft"], required=True, help="the format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist")
    parser.add_argument("--task", metavar="NAME", help="task to export (multi-task prompts)")
    parser.add_argument(
        "--base-model", metavar="NAME", help="name or folder of the backbone in transformers (default: as trained)"
    )
    parser.add_argument("--template", metavar="TEXT", help="how a row is written, if the file does not store it")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.out.exists():
        raise CommandError(f"{args.out} exists; remove it, or choose another --out")
    from lightning_softprompt.inference.prompt import load_prompt
    from lightning_softprompt.interchange.peft_export import to_peft

    try:
        export = to_peft(load_prompt(args.prompt, template=args.template), args.out, args.task, args.base_model)
    except (ValueError, OSError) as error:
        raise CommandError(f"{args.prompt}: {error}") from error
    lead = f", of which {export.num_lead} stand for tokens of the template" if export.num_lead else ""
    print(f"Wrote {export.folder}: {export.num_virtual_tokens} virtual tokens{lead}")
    if export.error is None:
        print("Not compared with PEFT, which is not installed: pip install 'lightning-softprompt[lora]'")
    else:
        print(f"The logits of PEFT differ by {export.error:.1e} of the largest one")
    return 0
