"""`softprompt export`: a trained prompt in the format of other software."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.inference.prompt import Prompt

DESCRIPTION = """\
Write trained prompts in the format of other software.

  softprompt export RUN/prompt.safetensors --format peft --out ADAPTER
  softprompt export sst2=RUN/prompt.safetensors trec6=RUN/prompt.safetensors --format vocabulary --out MODEL

peft        an adapter folder of HF PEFT: soft tokens as prompt tuning, keys and values as prefix tuning. PEFT puts its
            virtual tokens before the text; its README.md shows how to tokenize the text. If the package peft is
            installed, the folder is loaded and its logits are compared.
vocabulary  the backbone as a plain folder of transformers with the soft tokens of one or several prompts as new tokens,
            for any server that loads such folders. Its chat template writes the row of the prompt that a request names.
            The folder is loaded with transformers, and its logits and greedy answers are compared.
past        keys and values of every layer, which fill a cache of transformers or the first inputs of an ONNX graph; its
            README.md shows how.

Prompts that the format cannot represent are refused, such as prompts that depend on the row.
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt export", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "prompts", nargs="+", metavar="[NAME=]FILE", help="prompt.safetensors or a checkpoint of a run (default name: "
        "that of its folder)",
    )  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, required=True, help="the format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist")
    parser.add_argument("--task", metavar="NAME", help="task to export (multi-task prompts)")
    parser.add_argument("--template", metavar="TEXT", help="how a row is written, if the file does not store it")
    parser.add_argument(
        "--base-model", metavar="NAME", help="peft: name or folder of the backbone in transformers (default: its name)"
    )
    parser.add_argument(
        "--head", choices=["copy", "tied"], default="copy", help="vocabulary: whether a tied head is separated from "
        "the embedding (copy, for all servers) or not (tied, smaller, for servers that apply suppress_tokens)",
    )  # fmt: skip
    parser.add_argument(
        "--max-probability", type=float, metavar="P", default=1e-4, help="vocabulary: limit of the probability of "
        "all soft tokens together (default: 1e-4)",
    )  # fmt: skip
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.out.exists():
        raise CommandError(f"{args.out} exists; remove it, or choose another --out")
    try:
        prompts = _load(args)
        FORMATS[args.format](prompts, args)
    except (ValueError, OSError) as error:
        raise CommandError(f"{', '.join(args.prompts)}: {error}") from error
    return 0


def _load(args: Namespace) -> dict[str, Prompt]:
    """Loads the prompts by name, on one backbone."""
    from lightning_softprompt.inference.prompt import load_prompt

    prompts: dict[str, Prompt] = {}
    for text in args.prompts:
        name, separator, path = text.partition("=")
        file = Path(path if separator else text)
        name = name if separator else file.absolute().parent.name
        if name in prompts:
            raise ValueError(f"two prompts have the name {name!r}; name them with NAME=FILE")
        shared = next((prompt.backbone for prompt in prompts.values()), None)
        prompts[name] = load_prompt(file, backbone=shared, template=args.template)
    return prompts


def _only_prompt(prompts: Mapping[str, Prompt]) -> Prompt:
    if len(prompts) > 1:
        raise ValueError("this format holds one prompt; export each prompt into a folder")
    return next(iter(prompts.values()))


def _export_peft(prompts: Mapping[str, Prompt], args: Namespace) -> None:
    from lightning_softprompt.interchange.peft_export import to_peft

    export = to_peft(_only_prompt(prompts), args.out, args.task, args.base_model)
    lead = f", of which {export.num_lead} stand for tokens of the template" if export.num_lead else ""
    print(f"Wrote {export.folder}: {export.num_virtual_tokens} virtual tokens{lead}")
    if export.error is None:
        print("Not compared with PEFT, which is not installed: pip install 'lightning-softprompt[lora]'")
    else:
        print(f"The logits of PEFT differ by {export.error:.1e} of the largest one")


def _export_vocabulary(prompts: Mapping[str, Prompt], args: Namespace) -> None:
    from lightning_softprompt.interchange.vocabulary_export import to_vocabulary

    tasks = dict.fromkeys(prompts, args.task) if args.task is not None else None
    export = to_vocabulary(prompts, args.out, args.head, args.max_probability, tasks)
    size = sum(path.stat().st_size for path in export.folder.iterdir())
    print(f"Wrote {export.folder}: {size:,} bytes")
    for name, check in export.checks.items():
        ids = export.token_ids[name]
        print(
            f"{name}: tokens {ids.start} to {ids.stop - 1}; logits differ by {check.logits:.1e} of the largest one, "
            f"{check.equal_answers} of {check.answers} greedy answers are equal"
        )
    if export.word is not None:
        print(
            f"Rows of the head: those of {export.word!r}; probability of all soft tokens up to {export.probability:.1e}"
        )


def _export_past(prompts: Mapping[str, Prompt], args: Namespace) -> None:
    from lightning_softprompt.interchange.past_export import to_past

    export = to_past(_only_prompt(prompts), args.out, args.task)
    lead = f", of which {export.num_lead} stand for tokens of the template" if export.num_lead else ""
    print(f"Wrote {export.folder}: keys and values of {export.positions} positions{lead}")


FORMATS = {"peft": _export_peft, "vocabulary": _export_vocabulary, "past": _export_past}
