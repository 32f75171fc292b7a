"""The view of a W&B project: its content, and saving it to a local server that answers like W&B."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import wandb

from lightning_softprompt.__main__ import main
from lightning_softprompt.runs.wandb_workspace import build_workspace

pytestmark = pytest.mark.wandb
VIEWER = {"id": "1", "username": "someone", "entity": "team", "flags": "{}", "teams": {"edges": []}}


@pytest.fixture
def requests(monkeypatch, tmp_path):
    """The requests that a local server in the place of W&B receives."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append(body)
            view = {"id": "v1", "name": body.get("variables", {}).get("name", "n")}
            content = json.dumps({"data": {"viewer": VIEWER, "upsertView": {"view": view, "inserted": True}}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    yield received
    wandb.teardown()
    server.shutdown()


def test_sections_grouping_and_lines():
    spec = build_workspace("team", "project", ["accuracy"], "view")._to_model().model_dump()["spec"]
    sections = {section["name"]: section["panels"] for section in spec["section"]["panel_bank_config"]["sections"]}
    assert list(sections) == ["Validation", "Training", "Test", "Prompt", "Speed", "Plots", "Settings that differ"]
    (line,) = sections["Validation"]
    config = line["config"]
    assert (config["metrics"], config["x_axis"]) == (["val/accuracy"], "trainer/global_step")
    assert (config["group_agg"], config["group_area"]) == ("mean", "minmax")
    assert [panel["config"]["metrics"] for panel in sections["Prompt"]] == [
        ["prompt/norm"], ["prompt/moved"], ["prompt/grad_norm"],
    ]  # fmt: skip
    (runs,) = spec["section"]["run_sets"]
    assert runs["grouping"] == [{"section": "run", "name": "group"}]


@pytest.mark.parametrize(
    ("arguments", "ascending"),
    [
        ([], False),
        (["--metrics", "loss", "rougeL"], True),
        (["--metrics", "rougeL", "loss"], False),
        (["--metrics", "my_error", "--mode", "min"], True),
    ],
)
def test_runs_are_sorted_by_their_best_validation_the_best_first(requests, arguments, ascending):
    assert main(["wandb-workspace", "--entity", "team", *arguments]) == 0
    (saved,) = [request for request in requests if "upsertView" in request["query"]]
    (runs,) = json.loads(saved["variables"]["spec"])["section"]["runSets"]
    (key,) = runs["sort"]["keys"]
    assert (key["key"]["name"], key["ascending"]) == ("best_value", ascending)


def test_metrics_of_retrieval_are_in_their_section():
    spec = build_workspace("team", "project", ["f1", "retrieval/mrr"], "view")._to_model().model_dump()["spec"]
    sections = {section["name"]: section["panels"] for section in spec["section"]["panel_bank_config"]["sections"]}
    shown = [panel["config"]["metrics"] for panel in [*sections["Validation"], *sections["Test"]]]
    assert shown == [["val/f1"], ["val_retrieval/mrr"], ["test/f1"], ["test_retrieval/mrr"]]


def test_the_view_is_saved(requests, capsys):
    assert main(["wandb-workspace", "--entity", "team", "--project", "mine", "--metrics", "loss"]) == 0
    (saved,) = [request for request in requests if "upsertView" in request["query"]]
    variables = saved["variables"]
    assert (variables["entityName"], variables["projectName"]) == ("team", "mine")
    assert "val/loss" in variables["spec"]
    assert re.search(r"Saved http://127.0.0.1:\d+/team/mine", capsys.readouterr().out)


def test_the_package_is_named_if_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("lightning_softprompt.cli.commands.wandb_workspace.find_spec", lambda name: None)
    assert main(["wandb-workspace", "--entity", "team"]) == 2
    assert "lightning-softprompt[wandb-workspace]" in capsys.readouterr().err
