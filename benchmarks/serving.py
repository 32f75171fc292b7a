"""Compares `softprompt serve` with HF PEFT that switches adapters for each request.

    python benchmarks/serving.py --data PATH/TO/classification

Requests of eight tasks arrive in random order from 1, 8 and 32 clients, each of which waits for its answer before it
sends the next request. Both sides are servers in a process of their own and generate the same 16 tokens, which are
compared first. PEFT runs one request at a time; its virtual tokens begin with the embedding of the start token, so that
its rows equal ours. `many` loads further prompts and repeats the measurement with requests for all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import torch
from methods import sample_rows
from peft import PromptTuningConfig, get_peft_model
from sides import restore_transformers_forwards

import lightning_softprompt as sp
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.inference.prompt import Prompt, load_prompt, save_prompt
from lightning_softprompt.serving.requests import RequestLimits
from lightning_softprompt.serving.server import ServerSettings, make_server
from lightning_softprompt.serving.service import ApiSettings

TASKS = tuple(f"task{number}" for number in range(8))
TEMPLATE, LENGTH, NEW = "{soft}Review: {text}\nSentiment: {target}", 20, 16
FIXED = Decoding(max_new_tokens=NEW, min_new_tokens=NEW)


def write_prompts(folder: Path, count: int, linear_backend: Any) -> None:
    """Writes prompts of random word embeddings, all for rows of the same template."""
    backbone = load_backbone(BackboneSpec(linear_backend=linear_backend))
    for number in range(count):
        method = sp.PromptTuning(length=LENGTH, backbone=backbone.spec)
        method.attach(backbone, seed=number)
        prompt = Prompt(method, {"": RowFormat(TEMPLATE, ("text",), max_tokens=128, decoding=FIXED)})
        save_prompt(prompt.method, folder / f"task{number}.safetensors")


def run_ours(folder: Path) -> None:
    """Serves the prompts of a folder until the process ends."""
    paths = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    backbone = load_prompt(folder / f"{TASKS[0]}.safetensors").backbone
    start = time.perf_counter()
    settings = ServerSettings(port=0, api=ApiSettings(limits=RequestLimits(timeout=1200)))
    server = make_server(paths, backbone, settings)
    print(f"{len(paths)} prompts and warm-up: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    server.run()


def run_peft(folder: Path) -> None:
    """Serves the same prompts with PEFT, one request at a time, until the process ends."""
    prompts = [load_prompt(folder / f"{TASKS[0]}.safetensors")]
    backbone = prompts[0].backbone
    prompts += [load_prompt(folder / f"{task}.safetensors", backbone) for task in TASKS[1:]]
    start_ids = backbone.codec.start
    tokens = [backbone.embed(torch.tensor(start_ids)), *(prompt.method.fold().tokens[0] for prompt in prompts)]  # type: ignore[index]
    restore_transformers_forwards(backbone)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH + len(start_ids))
    model: Any = get_peft_model(backbone.model, config, adapter_name=TASKS[0])
    for number, task in enumerate(TASKS):
        if number:
            model.add_adapter(task, config)
        model.prompt_encoder[task].embedding.weight.data.copy_(torch.cat([tokens[0], tokens[number + 1]]))
    model.eval()
    view, lock = prompts[0].view(None), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            (batch,) = view.batches([body["prompt"]], 1)
            ids = backbone.without_answers(batch).input_ids[:, len(start_ids) :]
            with lock, torch.inference_mode():
                model.set_adapter(body["model"])
                options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
                output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            (text,) = backbone.codec.decode(output[:, -NEW:])
            reply = json.dumps({"choices": [{"text": text}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"Serving on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


SIDES = {"ours": run_ours, "peft": run_peft}


@dataclass
class Running:
    """A server in a process of its own."""

    url: str
    process: psutil.Process

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    @property
    def megabytes(self) -> float:
        """Resident memory."""
        return float(self.process.memory_info().rss) / 2**20


@contextmanager
def start(side: str, folder: Path) -> Iterator[Running]:
    """Starts a server."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Running(process.stdout.readline().split()[-1], psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


@dataclass
class Load:
    """What clients measured."""

    texts: list[str]
    seconds: float
    cpu_seconds: float
    latencies: list[float]

    def row(self, side: str, clients: int, megabytes: float) -> str:
        """A row of the table."""
        tokens = len(self.texts) * NEW
        cuts = quantiles(self.latencies, n=20, method="inclusive")
        median, p95 = cuts[9], cuts[18]
        per_cpu_second, per_second = tokens / self.cpu_seconds, tokens / self.seconds
        cells = [side, clients, f"{per_cpu_second:.1f}", f"{per_second:.1f}", f"{median:.2f}", f"{p95:.2f}"]
        return f"| {' | '.join(map(str, cells))} | {megabytes:.0f} |"


def send(running: Running, requests: Sequence[tuple[str, str]], clients: int) -> Load:
    """Sends requests from a number of clients, each of which waits for its answer."""
    with httpx.Client(base_url=running.url, timeout=1200) as http, ThreadPoolExecutor(clients) as threads:

        def ask(request: tuple[str, str]) -> tuple[str, float]:
            begin = time.perf_counter()
            body = {"model": request[0], "prompt": request[1], "max_tokens": NEW}
            reply = http.post("/v1/completions", json=body)
            reply.raise_for_status()
            return reply.json()["choices"][0]["text"], time.perf_counter() - begin

        begin, cpu = time.perf_counter(), running.cpu_seconds
        texts, latencies = zip(*threads.map(ask, requests), strict=True)
        return Load(list(texts), time.perf_counter() - begin, running.cpu_seconds - cpu, list(latencies))


def measure_first_text(running: Running, requests: Sequence[tuple[str, str]]) -> float:
    """Returns the median seconds to the first text of a stream, with one client."""
    seconds = []
    with httpx.Client(base_url=running.url, timeout=1200) as http:
        for model, text in requests:
            body = {"model": model, "prompt": text, "max_tokens": NEW, "stream": True}
            begin = time.perf_counter()
            with http.stream("POST", "/v1/completions", json=body) as reply:
                for number, _ in enumerate(reply.iter_lines()):
                    if number == 0:
                        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[len(seconds) // 2]


def compare(args: Any, folder: Path) -> None:
    """Prints the table of both sides."""
    texts = [row["text"] for row in sample_rows(str(args.data / "sst2"), "test", args.requests)]
    rng = random.Random(0)
    requests = [(rng.choice(TASKS), text) for text in texts]
    expected: list[str] | None = None
    print(
        "| | clients | tokens per CPU second | tokens per second | p50 s | p95 s | MB |\n|---|---|---|---|---|---|---|"
    )
    for side in args.sides:
        with start(side, folder) as running:
            for clients in args.clients:
                send(running, requests[: 2 * clients], clients)  # warm-up
                load = send(running, requests, clients)
                expected = expected or load.texts
                equal = sum(map(str.__eq__, load.texts, expected))
                print(load.row(side, clients, running.megabytes), f"{equal} of {len(requests)} texts equal", flush=True)
            if side == "ours":
                print(f"first text of a stream: {measure_first_text(running, requests[:5]):.2f} s", flush=True)


def measure_many(args: Any, folder: Path) -> None:
    """Prints memory and throughput of all prompts in the folder."""
    texts = [row["text"] for row in sample_rows(str(args.data / "sst2"), "test", args.requests)]
    rng = random.Random(1)
    requests = [(f"task{rng.randrange(args.many)}", text) for text in texts]
    with start("ours", folder) as running:
        send(running, requests[:16], 8)
        print(send(running, requests, 8).row(f"ours, {args.many} prompts", 8, running.megabytes), flush=True)


def main() -> None:
    """Runs the comparison, or one of its servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--sides", nargs="*", default=["ours", "peft"], choices=list(SIDES))
    parser.add_argument("--many", type=int, default=500, help="number of prompts of the last measurement; 0 omits it")
    parser.add_argument("--linear-backend", default="plain", help="products of our side")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        SIDES[args.side](args.folder)
        return
    with TemporaryDirectory() as folder:
        if args.sides:
            write_prompts(Path(folder), len(TASKS), args.linear_backend)
            compare(args, Path(folder))
        if args.many:
            write_prompts(Path(folder), args.many, args.linear_backend)
            measure_many(args, Path(folder))


if __name__ == "__main__":
    main()
