"""`softprompt push` against a local stand-in of the hub's API."""

import base64
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import huggingface_hub.constants
import pytest

from lightning_softprompt import PromptTuning, load_prompt, save_prompt
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.cli.commands import import_command
from lightning_softprompt.system.errors import CommandError

REPO = "someone/sst2-prompt"


class Hub(BaseHTTPRequestHandler):
    """The calls of a hub that an upload of small files makes."""

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, self.headers.get("authorization"), body))
        if self.server.refuses and self.path != "/api/repos/create":
            self.answer(403, {"error": "no write access"})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"{self.server.address}/{REPO}", "name": REPO, "id": REPO})
        elif self.path.startswith(f"/api/models/{REPO}/preupload/"):
            files = json.loads(body)["files"]
            self.answer(200, {"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files
            ]})  # fmt: skip
        elif self.path.startswith(f"/api/models/{REPO}/commit/"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{self.server.address}/{REPO}/commit/{'0' * 40}"
            self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self):
        self.answer(200, {"id": REPO, "sha": "0" * 40, "siblings": []})

    def answer(self, status, values):
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.files, server.refuses = [], {}, False
    server.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def prompt_file(load_once, tmp_path):
    backbone = load_once("llama")
    method = PromptTuning(length=3, backbone=backbone.spec)
    method.attach(backbone)
    method.remember_formats({"": RowFormat("{soft}{text} :{target}", decoding=Decoding(max_new_tokens=4))})
    return save_prompt(method, tmp_path / "sst2.safetensors")


def push(hub, source, *options):
    return import_command("push").main([str(source), "--repo", REPO, "--endpoint", hub.address, *options])


def test_a_prompt_is_uploaded_with_a_card_and_can_be_used(hub, prompt_file, load_once, tmp_path, capsys):
    assert push(hub, prompt_file, "--private") == 0
    assert f"{hub.address}/{REPO}/commit/" in capsys.readouterr().out
    assert sorted(hub.files) == ["README.md", "prompt.safetensors"]
    assert json.loads(hub.calls[0][2])["visibility"] == "private"
    assert {token for _, token, _ in hub.calls} == {"Bearer hf_secret"}
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: lightning-softprompt\n")
    assert "PromptTuning" in card
    assert "{soft}{text} :{target}" in card
    (tmp_path / "downloaded.safetensors").write_bytes(hub.files["prompt.safetensors"])
    prompt = load_prompt(tmp_path / "downloaded.safetensors")
    expected = load_prompt(prompt_file, backbone=load_once("llama")).predict(["a warm film"])
    assert prompt.predict(["a warm film"]) == expected


def test_an_exported_folder_is_uploaded_as_it_is(hub, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "README.md").write_text("# prompt\n")
    (folder / "weights.safetensors").write_bytes(b"weights")
    assert push(hub, folder) == 0
    assert hub.files == {"README.md": b"# prompt\n", "weights.safetensors": b"weights"}


def test_nothing_is_uploaded_that_is_not_a_prompt_or_leaves_the_folder(hub, prompt_file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(CommandError, match=r"has no README.md"):
        push(hub, folder)
    (folder / "README.md").write_text("# prompt\n")
    (folder / "secret").symlink_to(prompt_file)
    with pytest.raises(CommandError, match="links are not uploaded"):
        push(hub, folder)
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(CommandError, match="is not a valid"):
        push(hub, tmp_path / "text.safetensors")
    assert not hub.calls


def test_a_refusal_of_the_hub_is_reported(hub, prompt_file):
    hub.refuses = True
    with pytest.raises(CommandError, match="could not be uploaded"):
        push(hub, prompt_file)
