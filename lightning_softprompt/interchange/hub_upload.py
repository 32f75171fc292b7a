"""`push_to_hub`: uploads a prompt with its model card, or an exported folder, to a model hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_softprompt import __version__
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.reports.model_card import model_card

PROMPT, CARD = "prompt.safetensors", "README.md"
LIBRARY = "lightning-softprompt"


def push_to_hub(source: Path, repo: str, private: bool = False, endpoint: str | None = None) -> str:
    """Uploads a prompt file with a model card, or a folder that has one.

    The access token is that of `hf auth login` or of the variable `HF_TOKEN`.

    Args:
        source: A `prompt.safetensors`, or a folder of `softprompt export` with its `README.md`.
        repo: The repository, such as `user/name`. It is created if it does not exist.
        private: Whether a new repository is private.
        endpoint: Address of the hub (default: that of `huggingface_hub`).

    Returns:
        Address of the commit.

    Raises:
        ValueError: If the source cannot be read, is a folder without `README.md` or with links, or the hub refuses it.
    """
    with TemporaryDirectory() as draft:
        folder = _check_folder(source) if source.is_dir() else _write_folder(source, Path(draft))
        return _upload(folder, repo, private, endpoint)


def _check_folder(folder: Path) -> Path:
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}; pass a prompt.safetensors, or a folder of softprompt export")
    links = [str(path) for path in sorted(folder.rglob("*")) if path.is_symlink()]
    if links:
        raise ValueError(f"{', '.join(links)}: links are not uploaded, since they can point to other files; copy them")
    return folder


def _write_folder(source: Path, folder: Path) -> Path:
    saved = read_prompt(source)
    if source.suffix != ".safetensors":
        raise ValueError(
            f"{source} is a checkpoint with the state of a training; push the prompt.safetensors of its run"
        )
    shutil.copyfile(source, folder / PROMPT)
    card = model_card(PROMPT, saved.backbone, saved.method, saved.rows, saved.training)
    (folder / CARD).write_text(card)
    return folder


def _upload(folder: Path, repo: str, private: bool, endpoint: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(endpoint=endpoint, library_name=LIBRARY, library_version=__version__)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a soft prompt")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ValueError(f"{repo} could not be uploaded: {error}") from error
    return str(commit.commit_url)
