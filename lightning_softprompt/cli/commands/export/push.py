"""`softprompt push`: upload a prompt and its model card to a model hub."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from lightning_softprompt.system.errors import CommandError


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt push",
        description="Upload a prompt with a model card that is written from its header, or a folder of `softprompt "
        "export` with its README.md, to the Hugging Face Hub. Log in first with `hf auth login`, or set HF_TOKEN.",
    )
    parser.add_argument("source", type=Path, help="prompt.safetensors, or a folder of softprompt export")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="repository, which is created if necessary")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--endpoint", metavar="URL", help="address of another hub (default: HF_ENDPOINT)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from lightning_softprompt.interchange.hub_upload import push_to_hub

    try:
        address = push_to_hub(args.source, args.repo, args.private, args.endpoint)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"Uploaded {args.source}: {address}")
    return 0
