"""`softprompt serve`: an HTTP server for trained prompts."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.optional_packages import import_optional

if TYPE_CHECKING:
    from lightning_softprompt.serving.server import ServerSettings

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
DESCRIPTION = """\
Serve trained prompts over HTTP. All prompts share one frozen backbone, and requests for different prompts run in the
same batch. Requires: pip install 'lightning-softprompt[serve]'

  softprompt serve sst2=runs/sst2/TIME-ID/prompt.safetensors news=news.safetensors
  softprompt serve --folder PROMPTS --admin-token-file ADMIN     prompts are added while the server runs

  curl localhost:8000/v1/classify -H 'Content-Type: application/json' -d '{"model": "sst2", "input": "a dull film"}'
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "news", "prompt": "..."}'

POST /v1/completions, /v1/chat/completions   OpenAI's API; `model` is the name of a prompt
POST /v1/classify                            class and probabilities
GET  /v1/models                              the prompts
POST /v1/prompts, DELETE /v1/prompts/NAME    add, replace and remove prompts of --folder (admin token)
GET  /health, /ready, /metrics               for probes and Prometheus

Only this machine can connect unless --host is set, which requires a token. Ctrl-C or SIGTERM: running requests finish.
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt serve", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="NAME=FILE", help="name and file of a prompt")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder of prompts that can be added")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 for a free one (default: 8000)")
    access = parser.add_argument_group("access")
    access.add_argument(
        "--token-file", type=Path, metavar="FILE", help="tokens, one per line (default: variable SOFTPROMPT_TOKEN)"
    )
    access.add_argument(
        "--admin-token-file", type=Path, metavar="FILE",
        help="tokens that may change prompts (default: variable SOFTPROMPT_ADMIN_TOKEN)",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-tokens", type=int, default=512, metavar="N", help="new tokens of an answer (512)")
    limits.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="body of a request (1 MiB)")
    limits.add_argument(
        "--max-prompt-bytes", type=int, default=256 << 20, metavar="BYTES", help="prompt file (256 MiB)"
    )
    limits.add_argument("--queue", type=int, default=256, metavar="ROWS", help="waiting rows; others get 429 (256)")
    limits.add_argument("--connections", type=int, default=1024, metavar="N", help="open connections (1024)")
    limits.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds of a request (120)")
    limits.add_argument("--grace", type=int, default=30, metavar="S", help="seconds to finish after SIGTERM (30)")
    batches = parser.add_argument_group("batches")
    batches.add_argument("--batch-rows", type=int, default=32, metavar="N", help="rows of a batch (32)")
    batches.add_argument("--window-ms", type=float, default=5, metavar="MS", help="wait for further rows (5)")
    batches.add_argument(
        "--warm-up", type=int, default=128, metavar="N", help="tokens of the rows that run at the start; 0: none (128)"
    )
    backbone = parser.add_argument_group("backbone (default: as the first prompt was trained)")
    backbone.add_argument("--backbone.name", dest="name", metavar="NAME")
    backbone.add_argument("--backbone.revision", dest="revision", metavar="REVISION")
    backbone.add_argument("--backbone.dtype", dest="dtype", metavar="DTYPE")
    backbone.add_argument("--backbone.linear_backend", dest="linear_backend", metavar="BACKEND")
    backbone.add_argument("--backbone.device", dest="device", metavar="DEVICE")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    prompts = _read_prompts(args.prompts)
    if not prompts and args.folder is None:
        raise CommandError("give prompts as NAME=FILE, or --folder")
    for name in ("max_tokens", "max_body", "max_prompt_bytes", "queue", "connections", "timeout", "batch_rows"):
        if getattr(args, name) <= 0:
            raise CommandError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    try:
        for package in PACKAGES:
            import_optional(package)
        settings = _settings(args)
        from lightning_softprompt.serving.server import make_server, open_backbone

        names = ("name", "revision", "dtype", "linear_backend", "device")
        options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        server = make_server(prompts, open_backbone(list(prompts.values()), options), settings)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    server.run()
    return 0


def _read_prompts(arguments: Sequence[str]) -> dict[str, Path]:
    prompts: dict[str, Path] = {}
    for argument in arguments:
        name, is_pair, path = argument.partition("=")
        if not is_pair or not name or not path:
            raise CommandError(f"a prompt is given as NAME=FILE, got {argument!r}")
        if name in prompts:
            raise CommandError(f"two prompts have the name {name!r}")
        prompts[name] = Path(path)
    return prompts


def _settings(args: Namespace) -> ServerSettings:
    from lightning_softprompt.serving.batching.engine import BatchLimits
    from lightning_softprompt.serving.middleware import Tokens
    from lightning_softprompt.serving.prompt_folder import PromptFolder
    from lightning_softprompt.serving.requests import RequestLimits
    from lightning_softprompt.serving.server import ServerSettings, read_tokens
    from lightning_softprompt.serving.service import ApiSettings

    users = read_tokens(args.token_file, "SOFTPROMPT_TOKEN")
    admins = read_tokens(args.admin_token_file, "SOFTPROMPT_ADMIN_TOKEN")
    folder: Any = None if args.folder is None else PromptFolder(args.folder, args.max_prompt_bytes)
    api = ApiSettings(
        Tokens(users, admins), folder, RequestLimits(args.max_tokens, args.timeout), max_body=args.max_body
    )
    batches = BatchLimits(args.batch_rows, args.queue, args.window_ms / 1000)
    return ServerSettings(args.host, args.port, args.grace, args.warm_up, args.connections, api, batches)
