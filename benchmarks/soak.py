"""Keeps `softprompt serve` busy with good and bad clients, and watches its memory.

    python benchmarks/soak.py --minutes 10

Clients complete, stream and classify texts, disconnect in the middle, send garbage, exceed limits and use a wrong
token, while a prompt is replaced, removed and added again. The backbone is a small random one, so that there are many
requests. Each reply must have a status that its request can have, and the resident memory of the server must stay
within 2 % after the first third of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_softprompt as sp
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec

USER, ADMIN = "soak-user-token", "soak-admin-token"
WORDS = "a the film is dull warm funny story about of dog long never and good bad".split()  # noqa: SIM905


def write_prompts(folder: Path) -> None:
    """Writes a small random backbone with the tokenizer of the default one, and prompts for it."""
    tokenizer = load_backbone(BackboneSpec()).codec.tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    spec = sp.BackboneSpec(name=str(folder / "backbone"))
    texts = sp.SummarizationDataModule(
        backbone=spec, train=[{"document": "a", "summary": "b"}], max_tokens=128, max_target_tokens=32, cache=False
    )
    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}]
    classes = sp.ClassificationDataModule(
        backbone=spec, train=rows, labels={"good": "good", "bad": "bad"}, cache=False,
        template="{soft}{text} It was {target}",
    )  # fmt: skip
    methods = {
        "soft": sp.PromptTuning(length=8, data=texts),
        "keys": sp.PrefixTuning(length=8, width=None, data=texts),
        "swapped": sp.PromptTuning(length=5, data=texts),
        "reviews": sp.PromptTuning(length=8, data=classes),
    }
    for name, method in methods.items():
        method.configure_model()
        sp.save_prompt(method, folder / f"{name}.safetensors")


class Soak:
    """The clients, and what they saw.

    Args:
        url: Address of the server.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_over = threading.Event()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def run(self, act: Callable[[httpx.Client, random.Random], tuple[str, int]], allowed: set[int], seed: int) -> None:
        """Repeats an action until the end, and notes statuses that it must not have."""
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {USER}"}, timeout=120) as http:
            while not self.is_over.is_set():
                try:
                    kind, status = act(http, rng)
                except httpx.HTTPError as error:
                    kind, status = f"{act.__name__} {type(error).__name__}", -1
                with self._lock:
                    self.counts[f"{kind} {status}"] += 1
                    if status not in allowed:
                        self.faults.append(f"{kind}: status {status}")
                time.sleep(rng.random() * 0.1)


def some_text(rng: random.Random) -> str:
    """Some words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))


def answer(http: httpx.Client, rng: random.Random) -> tuple[str, int]:
    """Completes a text, with any of the prompts and options."""
    options: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "n": rng.choice([1, 1, 2])}
    if rng.random() < 0.3:
        options |= {"temperature": 1.0, "seed": rng.randrange(100)}
    body = {"model": rng.choice(["soft", "keys", "swapped"]), "prompt": some_text(rng), **options}
    return "answer", http.post("/v1/completions", json=body).status_code


def classify(http: httpx.Client, rng: random.Random) -> tuple[str, int]:
    """Predicts classes."""
    body = {"model": "reviews", "input": [some_text(rng) for _ in range(rng.randint(1, 4))]}
    return "classify", http.post("/v1/classify", json=body).status_code


def stream_and_leave(http: httpx.Client, rng: random.Random) -> tuple[str, int]:
    """Streams an answer, and often disconnects in the middle."""
    body = {"model": "soft", "prompt": some_text(rng), "max_tokens": 24, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as reply:
        for number, _ in enumerate(reply.iter_lines()):
            if rng.random() < 0.2 and number:
                break
        return "stream", reply.status_code


def exceed_limits(http: httpx.Client, rng: random.Random) -> tuple[str, int]:
    """Sends long texts, many rows, large bodies, unknown names, wrong tokens."""
    body: dict[str, Any] = {"model": "soft", "prompt": "a"}
    changes: list[dict[str, Any]] = [
        {"prompt": "dog " * 500}, {"prompt": ["a"] * 64}, {"prompt": "a" * (1 << 17)}, {"max_tokens": 100_000},
        {"model": f"unknown{rng.random()}"}, {"columns": {"x": "y"}}, {"unknown": 1}, {"n": 9},
    ]  # fmt: skip
    headers = {"Authorization": "Bearer wrong"} if rng.random() < 0.2 else {}
    return "limits", http.post("/v1/completions", json={**body, **rng.choice(changes)}, headers=headers).status_code


def send_garbage(http: httpx.Client, rng: random.Random) -> tuple[str, int]:
    """Sends bytes that are not a request, or a body that is not JSON; some connections stay unfinished."""
    if rng.random() < 0.5:
        path = rng.choice(["/v1/completions", "/v1/classify", "/v1/prompts", "/nowhere"])
        headers = {"Content-Type": "application/json"}
        return "garbage", http.post(path, content=rng.randbytes(200), headers=headers).status_code
    address, header = http.base_url, f"Authorization: Bearer {USER}\r\nContent-Length: 500"
    with socket.create_connection((address.host, address.port or 80)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n"
        connection.sendall(rng.choice([rng.randbytes(300), head.encode() + b"{", head.encode()[:40]]))
    return "raw bytes", 0


def swap(http: httpx.Client, rng: random.Random) -> tuple[str, int]:
    """Replaces a prompt that is in use, or removes it."""
    headers = {"Authorization": f"Bearer {ADMIN}"}
    if rng.random() < 0.2:
        return "remove", http.delete("/v1/prompts/swapped", headers=headers).status_code
    path = rng.choice(["soft", "swapped", "keys"])
    body = {"name": "swapped", "path": f"{path}.safetensors"}
    return "swap", http.post("/v1/prompts", json=body, headers=headers).status_code


ACTIONS: list[tuple[Any, set[int], int]] = [  # the action, statuses that it may get, number of clients
    (answer, {200, 404, 429}, 4),
    (classify, {200, 429}, 1),
    (stream_and_leave, {200, 429}, 2),
    (exceed_limits, {400, 401, 404, 413, 429}, 1),
    (send_garbage, {0, 400, 403, 404, 401}, 1),
    (swap, {200, 404}, 1),
]


def main() -> None:
    """Runs the soak and prints the result; the exit code is 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_prompts(folder)
        prompts = [f"{name}={folder / name}.safetensors" for name in ("soft", "keys", "swapped", "reviews")]
        command = [
            sys.executable,
            "-m",
            "lightning_softprompt",
            "serve",
            *prompts,
            "--port",
            "0",
            "--folder",
            temporary,
        ]
        command += ["--max-body", "100000", "--queue", "32"]
        tokens = {"SOFTPROMPT_TOKEN": USER, "SOFTPROMPT_ADMIN_TOKEN": ADMIN}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **tokens})
        assert server.stdout is not None
        soak = Soak(server.stdout.readline().split()[-1])
        faults = watch(soak, server, args.minutes * 60)
        server.terminate()
        code = server.wait(60)
    print(f"exit code after SIGTERM: {code}")
    for fault in sorted(set(faults)):
        print(f"FAULT: {fault}")
    sys.exit(bool(faults or code))


def watch(soak: Soak, server: subprocess.Popen[str], seconds: float) -> list[str]:
    """Runs the clients, and prints the memory of the server every 20th of the time. Returns what was wrong."""
    clients = [(action, allowed, number) for action, allowed, count in ACTIONS for number in range(count)]
    threads = [threading.Thread(target=soak.run, args=client) for client in clients]
    for thread in threads:
        thread.start()
    process, megabytes = psutil.Process(server.pid), []
    for _ in range(20):
        time.sleep(seconds / 20)
        if server.poll() is not None:
            soak.faults.append("the server ended")
            break
        megabytes.append(process.memory_info().rss / 2**20)
        print(f"{megabytes[-1]:.1f} MB, {soak.counts.total()} requests", flush=True)
    soak.is_over.set()
    for thread in threads:
        thread.join()
    late = megabytes[len(megabytes) // 3 :]
    growth = late[-1] / late[0] - 1
    print(json.dumps(dict(sorted(soak.counts.items())), indent=1))
    first, last, most = late[0], late[-1], max(late)
    print(f"memory after the first third: {first:.1f} to {last:.1f} MB, {growth:+.2%}, most {most:.1f}")
    return soak.faults + ([f"memory grew by {growth:.2%}"] if growth > 0.02 else [])


if __name__ == "__main__":
    main()
