"""The server, through the official client of OpenAI's API, on a tiny backbone."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import tiny
import torch

import lightning_softprompt as sp
from lightning_softprompt.__main__ import main
from lightning_softprompt.methods import DePT, LatePromptTuning
from lightning_softprompt.serving.batching.engine import BatchLimits
from lightning_softprompt.serving.middleware import Tokens
from lightning_softprompt.serving.prompt_folder import PromptFolder
from lightning_softprompt.serving.requests import RequestLimits
from lightning_softprompt.serving.server import ServerSettings, make_server
from lightning_softprompt.serving.service import ApiSettings

USER, ADMIN = "user-token", "admin-token"
TEXTS = ("a warm and funny film", "dull", "it is a sad story about a dog", "good ?", "this film , good", "never")
METHODS = {
    "soft": lambda data: sp.PromptTuning(length=3, data=data),
    "long": lambda data: sp.PromptTuning(length=5, data=data),
    "keys": lambda data: sp.PrefixTuning(length=2, width=None, data=data),
    "shift": lambda data: DePT(length=3, rank=2, data=data),
    "late": lambda data: LatePromptTuning(length=2, layer=1, data=data),
}


def save(method, path, seed=0):
    torch.manual_seed(seed)
    method.configure_model()
    tiny.perturb(method)
    sp.save_prompt(method, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with prompts of several methods: texts, classes of reviews, and a prompt of another backbone."""
    root = tmp_path_factory.mktemp("serving")
    spec = sp.BackboneSpec(name=str(tiny.save("llama", root / "llama")))
    common = {"max_tokens": 28, "cache": False, "max_target_tokens": 12}
    texts = sp.SummarizationDataModule(
        backbone=spec, train=[{"document": "dull", "summary": "good"}],
        template="{soft}{document} it was {target}", **common,
    )  # fmt: skip
    for seed, (name, make) in enumerate(METHODS.items()):
        save(make(texts), root / f"{name}.safetensors", seed)
    save(sp.PromptTuning(length=3, data=texts), root / "other.safetensors", 9)
    talk = sp.InstructionDataModule(
        backbone=spec, train=[{"instruction": "dull", "output": "good"}], max_tokens=44, max_target_tokens=4,
        decoding=sp.Decoding(max_new_tokens=4), cache=False,
    )  # fmt: skip
    save(sp.PromptTuning(length=3, data=talk), root / "talk.safetensors", 3)
    classes = sp.ClassificationDataModule(
        backbone=spec, train=[{"text": "dull", "label": "bad"}, {"text": "warm", "label": "good"}],
        labels={"good": "good", "bad": "bad"}, template="{soft}{text} it was {target}", max_tokens=28, cache=False,
    )  # fmt: skip
    save(sp.PromptTuning(length=3, data=classes), root / "reviews.safetensors")
    stranger = sp.BackboneSpec(name=str(tiny.save("llama", root / "stranger", seed=1)))
    data = sp.SummarizationDataModule(
        backbone=stranger, train=[{"document": "dull", "summary": "good"}],
        template="{soft}{document} it was {target}", **common,
    )  # fmt: skip
    save(sp.PromptTuning(length=3, data=data), root / "stranger.safetensors")
    (root / "link.safetensors").symlink_to(root / "soft.safetensors")
    (root / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    return root


@pytest.fixture(scope="module")
def prompts(folder):
    """The prompts in this process, without the server, on their own backbone."""
    first = sp.load_prompt(folder / "soft.safetensors")
    names = [*METHODS, "other", "reviews", "talk"]
    return {name: sp.load_prompt(folder / f"{name}.safetensors", first.backbone) for name in names}


@pytest.fixture(scope="module")
def server(folder):
    """A running server; yields its address and its parts."""
    api = ApiSettings(
        Tokens((USER,), (ADMIN,)), PromptFolder(folder, 1 << 20), RequestLimits(max_tokens=30, timeout=20), 1 << 14, 2
    )
    settings = ServerSettings(port=0, warm_up=0, grace=5, api=api, batches=BatchLimits(rows=8, queue=24))
    backbone = sp.load_prompt(folder / "soft.safetensors").backbone
    paths = {name: folder / f"{name}.safetensors" for name in (*METHODS, "reviews", "talk")}
    running = make_server(paths, backbone, settings)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    running.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    yield running
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=USER, max_retries=0)


@pytest.fixture(scope="module")
def http(server):
    headers = {"Authorization": f"Bearer {USER}", "Content-Type": "application/json"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as http:
        yield http


@pytest.fixture
def admin(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30) as admin:
        yield admin


def complete(client, model, text, **options):
    return client.completions.create(model=model, prompt=text, **options).choices[0].text


def test_mixed_requests_get_the_answers_of_each_prompt_alone(client, prompts):
    cases = [(name, text) for text in TEXTS for name in METHODS]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda case: complete(client, *case, max_tokens=8), cases))
    alone = {name: prompts[name].generate(TEXTS, max_new_tokens=8) for name in METHODS}
    assert answers == [alone[name][TEXTS.index(text)] for name, text in cases]
    assert len(set(answers)) > len(METHODS)


def test_classes_have_the_probabilities_of_the_prompt_alone(http, prompts):
    reply = http.post("/v1/classify", json={"model": "reviews", "input": list(TEXTS), "top_k": 1})
    expected = prompts["reviews"].predict(TEXTS)
    entries = reply.json()["data"]
    assert [entry["label"] for entry in entries] == [record["prediction"] for record in expected]
    for entry, record in zip(entries, expected, strict=True):
        assert entry["probs"] == pytest.approx(list(record["scores"].values()), abs=1e-5)
        assert entry["scores"] == pytest.approx({record["prediction"]: max(record["scores"].values())}, abs=1e-5)


def test_chat_and_streams_give_the_same_text(client, prompts):
    (expected,) = prompts["soft"].generate([TEXTS[0]], max_new_tokens=8)
    messages = [{"role": "user", "content": TEXTS[0]}]
    chat = client.chat.completions.create(model="soft", messages=messages, max_tokens=8)
    assert chat.choices[0].message.content == expected
    assert chat.usage.prompt_tokens > 0
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    pieces = client.completions.create(model="soft", prompt=TEXTS[0], max_tokens=8, stream=True)
    texts, reasons = zip(*[(piece.choices[0].text, piece.choices[0].finish_reason) for piece in pieces], strict=True)
    assert "".join(texts) == expected
    assert sum(map(bool, texts)) > 1
    assert reasons[-1] == chat.choices[0].finish_reason
    assert not any(reasons[:-1])
    chunks = list(
        client.chat.completions.create(
            model="soft", messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens


def test_dialogues_are_answered_with_their_earlier_turns(client, prompts):
    turns = [("user", TEXTS[1]), ("assistant", TEXTS[2]), ("user", TEXTS[3])]
    messages = [{"role": role, "content": text} for role, text in turns]
    reply = client.chat.completions.create(model="talk", messages=messages)
    (expected,) = prompts["talk"].generate([{"messages": messages}])
    (without,) = prompts["talk"].generate([{"messages": messages[2:]}])
    assert reply.choices[0].message.content == expected != without


def test_sampled_answers_depend_on_the_seed_and_not_on_other_rows(client):
    options = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 8}

    def sample(seed):
        reply = client.completions.create(model="soft", prompt=TEXTS[0], n=3, seed=seed, **options)
        return [choice.text for choice in reply.choices]

    alone = sample(5)
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(complete, client, name, TEXTS[2], max_tokens=12) for name in METHODS]
        together = list(threads.map(sample, (5, 6)))
        [other.result() for other in others]
    assert together[0] == alone
    assert together[1] != alone
    assert len(set(alone)) > 1


def test_stop_texts_and_lengths_end_answers(client):
    whole = client.completions.create(model="soft", prompt=TEXTS[0], max_tokens=8, stop=[])
    words = whole.choices[0].text.split()
    stopped = client.completions.create(model="soft", prompt=TEXTS[0], max_tokens=8, stop=words[3])
    first = words.index(words[3])
    assert stopped.choices[0].text.split() == words[:first]
    assert stopped.choices[0].finish_reason == "stop"
    short = client.completions.create(model="soft", prompt=TEXTS[0], max_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2


def test_logprobs_are_those_of_the_forward_pass(client, prompts):
    reply = client.completions.create(model="soft", prompt=TEXTS[0], max_tokens=3, logprobs=2)
    logprobs = reply.choices[0].logprobs
    backbone, method = prompts["soft"].backbone, prompts["soft"].method
    (batch,) = prompts["soft"].view(None).batches([TEXTS[0]], 1)
    answer = backbone.codec.tokenizer.convert_tokens_to_ids(logprobs.tokens)
    with torch.inference_mode():
        expected = method.lm().logprobs(backbone.codec.with_answers(batch, [[answer]]))[0]
    assert logprobs.token_logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 2
        assert max(top.values()) == pytest.approx(value)
        assert token in top


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", {"prompt": "a", "frequency_penalty": 1}, 400, "unknown field 'frequency_penalty'"),
        ("completions", {}, 400, "prompt: Field required"),
        ("completions", {"prompt": "a", "temperature": float("nan")}, 400, "temperature"),
        ("completions", {"prompt": "a", "max_tokens": 31}, 400, "at most 30"),
        ("completions", {"prompt": "a", "columns": {"x": "y"}}, 400, "unknown columns"),
        ("completions", {"prompt": "a", "stream": True, "logprobs": 1}, 400, "not supported with stream"),
        ("completions", {"prompt": "a " * 40}, 400, "exceeds the 28 tokens"),
        ("completions", {"prompt": "a " * 13, "max_tokens": 30, "model": "long"}, 400, "window"),
        ("completions", {"prompt": "a", "model": "nobody"}, 404, "GET /v1/models"),
        ("completions", {"prompt": ["a"] * 25}, 429, "queue holds 24"),
        ("chat/completions", {"messages": [{"role": "system", "content": "a"}]}, 400, "not trained on dialogues"),
        ("classify", {"input": "a"}, 400, "has no classes"),
        ("classify", {"model": "reviews", "input": [{"other": "a"}]}, 400, "no column 'text'"),
        ("completions", {"prompt": "\ud800"}, 400, "valid Unicode"),
        ("completions", {"prompt": "a", "\ud800": 1}, 400, "unicode"),
        ("completions", {"prompt": "a" * (1 << 14)}, 413, "exceeds"),
    ],
)
def test_wrong_requests_get_an_error_that_names_the_mistake(http, path, body, status, words):
    reply = http.post(f"/v1/{path}", content=json.dumps({"model": "soft", **body}))
    assert reply.status_code == status, reply.text
    assert words in reply.json()["error"]["message"]
    assert (reply.headers.get("Retry-After") is not None) == (status == 429)


def test_requests_need_a_token(server, client, admin):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="user-tokem", max_retries=0).models.list()
    with pytest.raises(openai.AuthenticationError):
        client.post("/prompts", body={"name": "new", "path": "soft.safetensors"}, cast_to=object)
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert {model.id for model in client.models.list()} == {*METHODS, "reviews", "talk"}
    assert admin.get("/v1/models/soft").json()["softprompt"]["method"] == "PromptTuning"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/etc/passwd", 400),
        ("../serving/soft.safetensors", 400),
        ("link.safetensors", 400),
        ("llama/config.json", 400),
        ("llama", 400),
        ("nothing.safetensors", 404),
        ("a" * 300 + ".safetensors", 404),
        ("soft.safetensors/x.safetensors", 404),
        ("damaged.safetensors", 400),
        ("stranger.safetensors", 409),
    ],
)
def test_only_prompt_files_of_the_folder_are_loaded(admin, folder, path, status):
    reply = admin.post("/v1/prompts", json={"name": "new", "path": path})
    assert reply.status_code == status, reply.text
    assert str(folder) not in reply.text
    assert admin.get("/v1/models/new").status_code == 404


def test_a_folder_that_is_a_link_is_not_followed(admin, folder, tmp_path):
    (tmp_path / "soft.safetensors").write_bytes((folder / "soft.safetensors").read_bytes())
    (folder / "outside").symlink_to(tmp_path)
    reply = admin.post("/v1/prompts", json={"name": "new", "path": "outside/soft.safetensors"})
    assert reply.status_code == 400
    assert "symbolic links" in reply.text


def test_swaps_under_load_leave_each_answer_of_one_version(client, admin, prompts):
    text = TEXTS[2]
    versions = {prompts[name].generate([text], max_new_tokens=8)[0] for name in ("soft", "other")}
    assert len(versions) == 2
    is_over = threading.Event()
    answers = []

    def ask():
        while not is_over.is_set():
            answers.append(complete(client, "swapped", text, max_tokens=8))

    assert admin.post("/v1/prompts", json={"name": "swapped", "path": "soft.safetensors"}).status_code == 200
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for name in ("other", "soft") * 5:
        assert admin.post("/v1/prompts", json={"name": "swapped", "path": f"{name}.safetensors"}).status_code == 200
    is_over.set()
    for thread in threads:
        thread.join()
    assert set(answers) <= versions
    assert len(answers) > 10
    assert admin.delete("/v1/prompts/swapped").json()["deleted"]
    with pytest.raises(openai.NotFoundError):
        complete(client, "swapped", text)


def test_a_client_that_disconnects_frees_its_rows(server, http):
    body = json.dumps({"model": "late", "prompt": ["a"] * 3, "n": 8, "max_tokens": 24}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {USER}\r\n"
    address = server.servers[0].sockets[0].getsockname()
    for _ in range(2):
        with socket.create_connection(address) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.05)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        metrics = http.get("/metrics").text
        if "softprompt_running_rows 0.0" in metrics and "softprompt_queue_length 0.0" in metrics:
            break
    assert "softprompt_queue_length 0.0" in metrics
    assert complete_once(http)


def complete_once(http):
    return http.post("/v1/completions", json={"model": "soft", "prompt": "a", "max_tokens": 2}).status_code == 200


def test_hostile_bodies_get_an_error_without_a_traceback(http):
    values = [
        None,
        True,
        -1,
        1e400,
        "",
        "\ud800",
        [],
        {},
        [[]],
        {"a": {}},
        "{soft}{target}",
        "<s></s>",
        2**70,
        ["a", 1],
    ]
    fields = ["model", "prompt", "messages", "input", "n", "stop", "logprobs", "stream", "columns", "seed", "top_k"]
    rng = random.Random(0)
    raw = [b"", b"{", b"\xff\xfe", b"[" * 5000, b'{"a":' * 3000, b"null", b'"x"', b'{"model": 1' + b"0" * 5000 + b"}"]
    bodies = [*raw]
    for _ in range(150):
        body = {"model": "soft", "prompt": "a", "max_tokens": 1} if rng.random() < 0.7 else {}
        body |= {rng.choice(fields): rng.choice(values) for _ in range(rng.randint(1, 3))}
        bodies.append(json.dumps(body).encode())
    for number, body in enumerate(bodies):
        path = ("completions", "chat/completions", "classify", "prompts")[number % 4]
        reply = http.post(f"/v1/{path}", content=body)
        assert reply.status_code < 500, (path, body, reply.text)
        assert "Traceback" not in reply.text
    reply = http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/xml"})
    assert reply.status_code == 400
    assert "Content-Type: application/json" in reply.text
    assert http.get("/v1/completions").status_code == 405
    assert complete_once(http)


def test_metrics_have_only_names_of_prompts(http):
    for _ in range(2):
        http.post("/v1/completions", json={"model": "invented", "prompt": "a"})
    metrics = http.get("/metrics").text
    assert 'softprompt_requests_total{code="404",endpoint="/v1/completions",prompt=""}' in metrics
    assert "invented" not in metrics
    assert 'softprompt_tokens_total{kind="generated",prompt="soft"}' in metrics


def test_the_command_ends_with_0_after_sigterm_and_finishes_requests(folder, tmp_path):
    (tmp_path / "tokens").write_text(f"{USER}\n")
    command = [
        sys.executable, "-m", "lightning_softprompt", "serve", f"soft={folder / 'soft.safetensors'}",
        "--port", "0", "--token-file", str(tmp_path / "tokens"), "--warm-up", "8",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = process.stdout.readline().split()[-1]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=USER, max_retries=0)
    with ThreadPoolExecutor(4) as threads:
        requests = [threads.submit(complete, client, "soft", TEXTS[0], n=8, max_tokens=12) for _ in range(4)]
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        for request in requests:
            error = request.exception()
            assert error is None or isinstance(error, openai.APIConnectionError | openai.InternalServerError)
    assert any(request.exception() is None for request in requests)


def test_chat_in_the_terminal_remembers_turns_and_changes_the_prompt(folder, prompts, monkeypatch, capsys):
    lines = [TEXTS[1], TEXTS[3], "/reset", TEXTS[3], "/prompt reviews", TEXTS[0], "/prompt", "/prompt nobody", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "not read"])))
    paths = [str(folder / "talk.safetensors"), f"reviews={folder / 'reviews.safetensors'}"]
    assert main(["chat", *paths, "--max-tokens", "3"]) == 0
    output = capsys.readouterr()
    answers = output.out.splitlines()
    talk = prompts["talk"]
    (first,) = talk.generate([TEXTS[1]], max_new_tokens=3)
    turns = [("user", TEXTS[1]), ("assistant", first), ("user", TEXTS[3])]
    dialogue = [{"role": role, "content": text} for role, text in turns]
    (second,) = talk.generate([{"messages": dialogue}], max_new_tokens=3)
    (alone,) = talk.generate([TEXTS[3]], max_new_tokens=3)
    assert answers[:4] == [first, second, "The turns are forgotten.", alone]
    assert answers[5].startswith(prompts["reviews"].predict([TEXTS[0]])[0]["prediction"])
    assert answers[6:] == ["Prompts: talk, reviews (in use)"]
    assert output.err == "error: no prompt 'nobody'; the prompts are talk, reviews\n"


def test_the_help_takes_less_than_half_a_second():
    before = os.times()
    result = subprocess.run([sys.executable, "-m", "lightning_softprompt", "serve", "--help"], capture_output=True)
    after = os.times()
    assert b"/v1/classify" in result.stdout
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


def test_other_addresses_require_a_token():
    with pytest.raises(ValueError, match="requires a token"):
        ServerSettings(host="0.0.0.0")
