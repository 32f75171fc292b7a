"""A local server that answers like Weights & Biases, so that tests can check what online runs send.

It answers the operations of wandb 0.31 that runs of this package use, and records all requests. Artifacts and the
number of lines of a run are remembered, so that a later run can use an artifact and continue a run.
"""

import gzip
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import wandb

KEY = "0" * 40  # an API key of a valid form
TEAM, PROJECT_NAME = "team", "project"
DATE = "2026-01-01T00:00:00"
OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")
STREAM = re.compile(r"/files/[^/]+/[^/]+/(?P<run>[^/]+)/file_stream")
VIEWER = {"id": "1", "username": "someone", "entity": TEAM, "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "p", "internalId": "p", "name": PROJECT_NAME, "entity": {"id": "e", "name": TEAM}}
Chunk = tuple[int, list[str]]  # number of the first line, and lines


@dataclass
class WandbServer:
    """What the server has received.

    Args:
        url: Address of the server.
        operations: Names and variables of GraphQL operations, in order.
        streams: Chunks of the files of each run that are sent line by line.
        uploads: Content of uploaded files by path.
        artifacts: Type of each artifact by name and alias, such as `prompt-1:best`.
        configs: The config of each run as JSON.
        refuses: Whether the server refuses all requests from now on.
    """

    url: str = ""
    operations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    streams: dict[str, dict[str, list[Chunk]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    uploads: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)
    refuses: bool = False

    def variables(self, operation: str) -> list[dict[str, Any]]:
        """Return the variables of each request of an operation."""
        return [variables for name, variables in self.operations if name == operation]

    def history(self, run: str) -> list[dict[str, Any]]:
        """Return the rows of the history of a run."""
        return [json.loads(line) for line in self.lines(run, "wandb-history.jsonl")]

    def config(self, run: str) -> dict[str, Any]:
        """Return the config of a run."""
        return {name: entry["value"] for name, entry in json.loads(self.configs[run]).items()}

    def summary(self, run: str) -> dict[str, Any]:
        """Return the last summary of a run."""
        return json.loads(self.lines(run, "wandb-summary.json")[-1])

    def lines(self, run: str, file: str) -> list[str]:
        """Return the lines of a file of a run."""
        return [line for _, lines in self.streams[run][file] for line in lines]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of the answer to an operation; nothing for operations without effect on runs."""
        self.operations.append((operation, variables))
        answers = {
            "Viewer": lambda _: {"viewer": VIEWER},
            "RunResumeStatus": self.find_run,
            "UpsertBucket": self.store_run,
            "CreateRunFiles": self.list_uploads,
            "CreateArtifact": self.store_artifact,
            "ArtifactType": self.find_artifact_type,
            "ArtifactMembershipByName": self.find_artifact,
            "UseArtifact": lambda values: {"useArtifact": {"artifact": {"id": values["artifactID"]}}},
        }
        return answers[operation](variables) if operation in answers else {}

    def find_run(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Answer whether a run exists, with the number of its lines."""
        name = variables["name"]
        if name not in self.configs:
            return {"model": None}
        history = self.lines(name, "wandb-history.jsonl")
        bucket = {
            "id": name,
            "name": name,
            "displayName": name,
            "summaryMetrics": (self.lines(name, "wandb-summary.json") or ["{}"])[-1],
            "config": self.configs[name],
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": 1}',
            "logLineCount": len(self.lines(name, "output.log")),
            "historyLineCount": len(history),
            "eventsLineCount": len(self.lines(name, "wandb-events.jsonl")),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": "[]",
        }
        return {"model": {**PROJECT, "bucket": bucket}}

    def store_run(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Create or change a run."""
        name = variables["name"]
        is_new = name not in self.configs
        self.configs[name] = variables.get("config") or self.configs.get(name, "{}")
        bucket = {
            "id": name,
            "name": name,
            "displayName": variables.get("displayName"),
            "description": "",
            "config": "{}",
            "sweepName": None,
            "historyLineCount": len(self.lines(name, "wandb-history.jsonl")),
            "project": PROJECT,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def list_uploads(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the addresses for the upload of the files of a run."""
        files = [{"name": name, "uploadUrl": f"{self.url}/{variables['run']}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def store_artifact(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Create an artifact; the server claims to have its files already."""
        values = variables["input"]
        for alias in values["aliases"]:
            self.artifacts[f"{alias['artifactCollectionName']}:{alias['alias']}"] = values["artifactTypeName"]
        artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def find_artifact_type(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the type of an artifact."""
        kind = self.artifacts.get(variables["name"])
        return {"project": {"artifact": None if kind is None else {"artifactType": {"name": kind}}}}

    def find_artifact(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return an artifact by its name and alias."""
        name = variables["name"]
        if name not in self.artifacts:
            return {"project": {"artifactCollectionMembership": None}}
        collection = {"__typename": "ArtifactSequence", "name": name.partition(":")[0], "project": PROJECT}
        artifact = {
            "__typename": "Artifact",
            "id": f"id of {name}",
            "artifactSequence": collection,
            "versionIndex": 0,
            "artifactType": {"name": self.artifacts[name]},
            "description": None,
            "metadata": "{}",
            "ttlDurationSeconds": 0,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": 0,
            "state": "COMMITTED",
            "size": 1,
            "digest": "0",
            "commitHash": "0",
            "fileCount": 1,
            "createdAt": DATE,
            "updatedAt": DATE,
        }
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "m",
            "versionIndex": 0,
            "createdAt": DATE,
            "aliases": [],
            "artifactCollection": collection,
            "artifact": artifact,
        }
        return {"project": {"artifactCollectionMembership": membership}}


class Handler(BaseHTTPRequestHandler):
    """Answers requests for one `WandbServer`."""

    protocol_version = "HTTP/1.1"
    received: WandbServer

    def do_GET(self) -> None:
        """Answer a download."""
        self.reply({})

    def do_PUT(self) -> None:
        """Store an uploaded file."""
        self.received.uploads[self.path] = self.body()
        self.reply({})

    def do_POST(self) -> None:
        """Answer a GraphQL operation, or store lines of files."""
        content = self.body()
        if self.received.refuses:
            self.send_error(403)
            return
        stream = STREAM.search(self.path)
        if self.path.endswith("/graphql"):
            request = json.loads(content)
            operation = OPERATION.search(request["query"])[1]
            self.reply({"data": self.received.answer(operation, request.get("variables") or {})})
            return
        if stream:
            for name, chunk in (json.loads(content).get("files") or {}).items():
                self.received.streams[stream["run"]][name].append((chunk["offset"], chunk["content"]))
        self.reply({"exitcode": None, "limits": {}})

    def body(self) -> bytes:
        """Read the body of the request."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def reply(self, answer: Mapping[str, Any]) -> None:
        """Send an answer as JSON."""
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def run_wandb_server() -> Iterator[WandbServer]:
    """Run a server on a free port of this machine."""
    received = WandbServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"received": received}))
    server.handle_error = lambda *args: None  # the client may close a connection early
    received.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wandb.teardown()
    yield received
    wandb.teardown()
    server.shutdown()
    server.server_close()
