"""A corpus of files that an attacker could share. `python tests/hostile_corpus.py FOLDER` writes it."""

import bz2
import gzip
import io
import json
import lzma
import struct
import sys
import zipfile
from collections import namedtuple
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml
from pyarrow import parquet

from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt

Hostile = namedtuple("Hostile", "kind name path")
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066<script>alert(1)</script>"
METHODS = "lightning_softprompt.methods"
LABEL_WORDS = "lightning_softprompt.readouts.label_words.LabelWords"
SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch made"}}


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def nest(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def repeat(levels, width=10):
    value = ["x"] * width
    for _ in range(levels):
        value = [value] * width
    return value


def methods():
    """Yield names and descriptions of methods, as prompts and checkpoints contain them."""
    plain = {"_class_path": f"{METHODS}.PromptTuning", "length": 3}
    names = ["os.system", "subprocess.getoutput", "subprocess.Popen", "builtins.exec", "shutil.rmtree",
             "torch.hub.load", "torch.load", "runpy.run_path", "importlib.import_module", "antigravity.geohash",
             "evilmod.Evil", "lightning_softprompt.system.atomic_files.write_file",
             "lightning.pytorch.callbacks.LambdaCallback",
             "jsonargparse.set_parsing_settings"]  # fmt: skip
    arguments = {"command": "touch made", "cmd": "touch made", "path": "made", "args": ["touch", "made"]}
    yield from ((f"readout-{n}", {**plain, "readout": {"class_path": n, "init_args": arguments}}) for n in names)
    yield from ((f"method-{n}", {"_class_path": n, **arguments}) for n in names[-5:])
    for argument in ("init", "optimizer", "scheduler", "objective", "classes", "evaluation", "backbone"):
        yield f"system-{argument}", {**plain, argument: SYSTEM}
    yield "penalties", {**plain, "penalties": [SYSTEM]}
    yield "text-json", {**plain, "readout": json.dumps(SYSTEM)}
    yield "text-path", {**plain, "readout": "os.system"}
    yield "inner", {**plain, "readout": {"class_path": LABEL_WORDS, "init_args": {"aggregate": SYSTEM}}}
    yield "dict-kwargs", {**plain, "readout": {"class_path": LABEL_WORDS, "dict_kwargs": {"x": SYSTEM}}}
    yield "path-of-lists", {**plain, "readout": {"class_path": ["os", "system"]}}
    yield "instantiator", {**plain, "_instantiator": "os.system", "readout": SYSTEM}
    lengths = [5, -1, 0, 10**5, 10**9, 10**12, 2**70]
    lengths += [[10**9], [3] * 1000, "3", 3.5, None]
    for length in lengths:
        yield f"length-{str(length)[:12]}", {**plain, "length": length}
    yield "width", {"_class_path": f"{METHODS}.PrefixTuning", "length": 3, "width": 10**9}
    yield "experts", {"_class_path": f"{METHODS}.SMoP", "length": 3, "experts": 10**6}
    yield "separate", {"_class_path": f"{METHODS}.ResidualPromptTuning", "length": 10**5, "separate": True}
    yield "candidates", {"_class_path": f"{METHODS}.Spring", "length": 10**11}
    yield "shapes", {"_class_path": f"{METHODS}.Folded", "shapes": {"tokens": [10**6, 10**6]}}
    yield "bank", {"_class_path": f"{METHODS}.PromptBank", "prompts": {"a": "/dev/zero", "b": "/dev/stdin"}}
    yield "source", {**plain, "init": {"class_path": "lightning_softprompt.prompts.init.FromCheckpoint",
                                       "init_args": {"path": "/dev/zero"}}}  # fmt: skip
    yield "nested", {**plain, "readout": nest(200)}
    yield "escapes", {**plain, ESCAPES: ESCAPES}
    yield "class-escapes", {"_class_path": ESCAPES}
    yield "unknown", {**plain, "no_such": 1}
    yield "empty", {}


def prompts(folder, owner):
    tensors = {"tokens": torch.ones(3, 32)}
    for name, method in methods():
        path = folder / f"{name.replace('/', '-')[:60] if name.isprintable() else 'escapes'}.safetensors"
        write_prompt(path, SavedPrompt(tensors, owner, method))
        yield Hostile("prompt", name, path)
    entry = {"dtype": "F32", "shape": [3, 32], "data_offsets": [0, 384]}
    texts = {
        "no-end": (2**62, {}), "claims-more": (90 * 2**20, {}), "short": (1, {}),
        "offsets": (None, {"tokens": {**entry, "data_offsets": [0, 2**60]}}),
        "backwards": (None, {"tokens": {**entry, "data_offsets": [384, 0]}}),
        "shape": (None, {"tokens": {**entry, "shape": [2**40, 2**20]}}),
        "overlap": (None, {"tokens": entry, "copy": entry}),
        "negative": (None, {"tokens": {**entry, "shape": [-3, -32]}}),
        "dtype": (None, {"tokens": {**entry, "dtype": "F8_E8M0", "data_offsets": [0, 96]}}),
        "metadata-nested": (None, {"tokens": entry, "__metadata__": {"backbone": "[" * 10**5, "method": "{}"}}),
        "metadata-digits": (None, {"tokens": entry, "__metadata__": {"backbone": "{}", "method": "9" * 10**6}}),
        "metadata-names": (None, {ESCAPES: entry, "__metadata__": {"backbone": "{}", "method": "{}"}}),
        "checksum": (None, {"tokens": entry, "__metadata__": {"backbone": "{}", "method": "{}", "checksum": ESCAPES}}),
    }  # fmt: skip
    for name, (length, header) in texts.items():
        text = json.dumps(header).encode()
        path = folder / f"raw-{name}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(384))
        yield Hostile("prompt", name, path)
    for name, content in {"nothing": b"", "nested-header": struct.pack("<Q", 10**5) + b"[" * 10**5}.items():
        (folder / f"{name}.safetensors").write_bytes(content)
        yield Hostile("prompt", name, folder / f"{name}.safetensors")


def checkpoints(folder, owner):
    method = {"_class_path": f"{METHODS}.PromptTuning", "length": 3}
    tokens = torch.ones(3, 32)
    loop = []
    loop.append(loop)
    valid = {"state_dict": {"tokens": tokens}, "backbone": owner, "hyper_parameters": method}
    overlapping = torch.zeros(10**5).as_strided((9 * 10**4, 10**4), (1, 1))
    values = {
        "stride": {"state_dict": {"tokens": torch.zeros(1).expand(10**10, 32)}},
        "overlap": {"state_dict": {"tokens": overlapping}},
        "many-views": {"state_dict": {"0": torch.ones(10**4)[:], **dict.fromkeys("abcdefgh", tokens)}},
        "meta": {"state_dict": {"tokens": torch.empty(10**9, 32, device="meta")}},
        "sparse": {"state_dict": {"tokens": torch.eye(3).to_sparse()}},
        "bytes": {"epoch": Call(bytearray, 10**10)},
        "storage": {"epoch": Call(torch.UntypedStorage, 4 * 10**9)},
        "typed-storage": {"epoch": Call(torch.storage.TypedStorage, 10**9)},
        "system": {"epoch": Call(__import__("os").system, "touch made")},
        "open": {"epoch": Call(open, "made", "w")},
        "import": {"epoch": Call(__import__, "antigravity")},
        "laughs": {"hyper_parameters": {**method, "readout": repeat(9)}},
        "laughs-elsewhere": {"callbacks": repeat(9)},
        "loop": {"hyper_parameters": {**method, "readout": loop}},
        "nested": {"loops": nest(400)},
        "readout": {"hyper_parameters": {**method, "readout": SYSTEM}},
        "texts": {"state_dict": "x", "hyper_parameters": 3},
        "numbers": {"state_dict": {1: tokens}},
    }
    for name, changes in values.items():
        path = folder / f"{name}.ckpt"
        torch.save({**valid, **changes}, path)
        yield Hostile("checkpoint", name, path)
    torch.save(valid, buffer := io.BytesIO())
    parts = {info.filename: data for info, data in _parts(buffer)}
    for name, packing in {"packed": zipfile.ZIP_DEFLATED, "lzma": zipfile.ZIP_LZMA}.items():
        with zipfile.ZipFile(folder / f"{name}.ckpt", "w", packing) as archive:
            for part, data in {**parts, "archive/data/9": bytes(50 * 2**20)}.items():
                archive.writestr(part, data)
        yield Hostile("checkpoint", name, folder / f"{name}.ckpt")
    (folder / "legacy.ckpt").write_bytes(__import__("pickle").dumps(Call(open, "made", "w")))
    (folder / "half.ckpt").write_bytes(buffer.getvalue()[:-200])
    yield from (Hostile("checkpoint", name, folder / f"{name}.ckpt") for name in ("legacy", "half"))


def _parts(buffer):
    with zipfile.ZipFile(buffer) as archive:
        for info in archive.infolist():
            yield info, archive.read(info)


def laughs(levels=9):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        references = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} [{references}]")
    return "\n".join(lines)


def yamls():
    """Yield names and texts of configs and studies."""
    yield "laughs", f"{laughs()}\nmodel: *a8"
    yield "loop", "model: &a [*a]"
    yield "merge", "a: &a {x: 1}\n" + "\n".join(f"m{i}: &m{i} {{<<: [*a, *a], y: *a}}" for i in range(10))
    yield "nested", "model: " + "[" * 10**5
    yield "nested-mapping", "model: " + "{a: " * 10**4
    yield "digits", "seed_everything: " + "9" * 10**6
    yield "sixties", "seed_everything: " + ":".join(["59"] * 10**5)
    yield "tag", "model: !!python/object/apply:os.system ['touch made']"
    yield "name", "model: !!python/name:os.system"
    yield "module", "model: !!python/module:antigravity"
    yield "escapes", f"model: {json.dumps(ESCAPES)}"
    yield "list", "[1, 2]"
    yield "text", "x"


def configs(folder):
    good = {"model": {"class_path": f"{METHODS}.PromptTuning", "init_args": {"length": 3}}}
    settings = {
        "model": {"model": SYSTEM}, "data": {"data": SYSTEM}, "backbone": {"backbone": SYSTEM},
        "callbacks": {"trainer": {"callbacks": [SYSTEM]}}, "logger": {"trainer": {"logger": SYSTEM}},
        "plugins": {"trainer": {"plugins": ["os.system"]}}, "strategy": {"trainer": {"strategy": SYSTEM}},
        "run": {"run": {"folder": "/tmp/elsewhere", "experiment": "../..", "wandb": "online"}},
        "readout": {"model": {**good["model"], "init_args": {"readout": SYSTEM}}},
        "module": {"model": {"class_path": "evilmod.Evil"}}, "replicas": {"replicas": {"inits": [SYSTEM]}},
    }  # fmt: skip
    texts = {name: yaml.safe_dump({**good, **changes}) for name, changes in settings.items()}
    for name, text in {**texts, **dict(yamls())}.items():
        path = folder / name / "config.yaml"
        path.parent.mkdir()
        path.write_text(text)
        yield Hostile("config", name, path)
    (folder / "bytes").mkdir()
    (folder / "bytes" / "config.yaml").write_bytes(b"\xff\xfe model: 3")
    yield Hostile("config", "bytes", folder / "bytes" / "config.yaml")


def studies(folder):
    texts = dict(yamls())
    texts["product"] = "repeat: {" + ", ".join(f"o{i}: [1, 2, 3, 4, 5, 6, 7, 8, 9]" for i in range(20)) + "}"
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
        yield Hostile("study", name, folder / f"{name}.yaml")


def rows(folder):
    row = {"text": ESCAPES, "label": ESCAPES, ESCAPES: 1}
    texts = {
        "escapes.jsonl": json.dumps(row), "raw.jsonl": json.dumps(row, ensure_ascii=False),
        "nested.jsonl": '{"text": ' + "[" * 10**5, "digits.jsonl": '{"text": ' + "9" * 10**5 + "}",
        "surrogates.jsonl": '{"text": "\\ud800"}', "nul.csv": "text,label\n\0,\0\n",
        "columns.csv": ",".join(["a"] * 9999), "bomb.parquet": "PAR1" * 99,
        "escapes.csv": f"text,{ESCAPES}\na,b,c\n", "escapes.json": json.dumps([row, ESCAPES]),
        "nested.json": "[" * 10**5, "quotes.csv": 'text\n"' + "x" * 10**5,
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
        yield Hostile("rows", name, folder / name)
    line = b'{"text": "' + b"a" * 10 * 2**20 + b'"}'
    packed = {
        "bomb.jsonl.gz": gzip.compress(line, 1), "bomb.json.bz2": bz2.compress(line),
        "bomb.txt.xz": lzma.compress(line, preset=0), "lines.csv.gz": gzip.compress(b"a\n" * 5 * 2**20, 1),
    }  # fmt: skip
    for name, content in packed.items():
        (folder / name).write_bytes(content)
        yield Hostile("rows", name, folder / name)
    repeated = pa.array(["a" * 2**16] * 10**3)
    tables = {"cells": pa.nulls(3 * 10**6), "repeated": repeated}
    for name, column in tables.items():
        parquet.write_table(pa.table({"text": column}), folder / f"{name}.parquet", compression="zstd")
        yield Hostile("rows", name, folder / f"{name}.parquet")


def documents(folder):
    """Yield pages that take long to parse unless the time is proportional to their size."""
    many = 5 * 10**4
    texts = {
        "nested.html": "<div>" * 10**4 + "x", "comments.html": "<!--" * many, "closed.html": ">" * many + "<!--" * many,
        "declarations.html": "<![CDATA[" * many, "ends.html": "<a>" + "</a" * many, "breaks.html": "a<br>" * 10**4,
        "escapes.html": f"<title>{ESCAPES}</title><p>{ESCAPES}", "heading.md": "# a" + "#" * 3000 + " x",
        "spaces.md": "# " + " " * many, "bomb.pdf": "%PDF-1.7\n" + "1 0 obj <<" * many,
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        yield Hostile("document", name, folder / name)


def indexes(folder, build):
    """Yield indexes that `build` creates from a text; their manifests are then changed and sealed again."""
    changes = {
        "texts": {}, "generation": {"generation": "../../.."}, "absolute": {"generation": "/etc"},
        "files": {"files": {"../../../etc/passwd": {"bytes": 3, "sha256": ""}}}, "count": {"passages": 2**80},
        "width": {"width": -1}, "escapes": {"corpus": ESCAPES}, "types": {"files": [SYSTEM]},
        "encoder": {"settings.encoder": "stranger/encoder"}, "url": {"settings.store": "qdrant", "settings.url": "http://127.0.0.1:9"},
        "size": {"settings.size": 10**30}, "language": {"settings.language": ESCAPES},
        "collection": {"collection": "../x", "settings.store": "qdrant"},
    }  # fmt: skip
    for name, change in changes.items():
        index = build(folder / name, ESCAPES)
        manifest = json.loads((index / "manifest.json").read_text())
        manifest.pop("seal")
        for key, value in change.items():
            noun, _, setting = key.partition(".")
            if setting:
                manifest[noun][setting] = value
            else:
                manifest[noun] = value
        _seal(index, manifest)
        yield Hostile("index", name, index)
    parts = {
        "documents-keys": ("documents.jsonl", b'{"x": 1}\n'), "documents-nested": ("documents.jsonl", b"[" * 10**5),
        "places": ("documents.npy", _array([0, 2**60])), "passages-float": ("passages.npy", _array([[0.5, 0, 5]])),
        "passages-outside": ("passages.npy", _array([[10**9, 0, 5]])), "passages-none": ("passages.npy", b""),
        "words-nested": ("lexical/vocab.index.json", b"[" * 10**5),
        "words-outside": ("lexical/vocab.index.json", json.dumps({"film": 10**12, "good": 5}).encode()),
        "backend": ("lexical/params.index.json", b'{"k1": "x", "method": "os.system", "backend": "numba"}'),
        "scores-outside": ("lexical/indices.csc.index.npy", _array([10**9] * 20)),
    }  # fmt: skip
    for name, (file, content) in parts.items():
        index = build(folder / name, ESCAPES)
        manifest = json.loads((index / "manifest.json").read_text())
        (index / manifest["generation"] / file).write_bytes(content)
        manifest["files"][file] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        manifest.pop("seal")
        _seal(index, manifest)
        yield Hostile("index", name, index)
    for name, text in {"nested": "[" * 10**5, "not-json": ESCAPES}.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(text)
        yield Hostile("index", name, folder / name)


def _seal(index, manifest):
    seal = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (index / "manifest.json").write_text(json.dumps({**manifest, "seal": seal}))


def _array(values):
    np.save(buffer := io.BytesIO(), np.array(values))
    return buffer.getvalue()


def names(folder, owner):
    """Yield a library whose files have names with terminal control characters."""
    method = {"_class_path": ESCAPES, "length": 3}
    write_prompt(
        folder / "library" / f"\x1b[2J\u202e{'x' * 9}.safetensors",
        SavedPrompt({"tokens": torch.ones(3, 32)}, {**owner, "name": ESCAPES}, method),
    )
    yield Hostile("library", "names", folder / "library")


def write_corpus(folder, owner, build):
    """Write all files and yield them by kind.

    Args:
        folder: Folder of the files.
        owner: Identity of the backbone in the prompts.
        build: Creates an index of a text in a folder, and returns the folder.
    """
    kinds = {
        "prompts": lambda at: prompts(at, owner), "checkpoints": lambda at: checkpoints(at, owner), "configs": configs,
        "studies": studies, "rows": rows, "indexes": lambda at: indexes(at, build),
        "names": lambda at: names(at, owner), "documents": documents,
    }  # fmt: skip
    for name, write in kinds.items():
        (folder / name).mkdir(parents=True)
        yield from write(folder / name)


def build_lexical(folder, text):
    """Create an index of one text without an encoder, and return its folder."""
    from lightning_softprompt.retrieval.index_builder import build_index
    from lightning_softprompt.retrieval.passages.documents import Document
    from lightning_softprompt.retrieval.search.settings import IndexSettings

    build_index(folder, [Document("1", text, f"is this film good {text}", text)], IndexSettings(encoder=None))
    return folder


if __name__ == "__main__":
    files = list(write_corpus(Path(sys.argv[1]), {"name": "nobody", "fingerprint": "0" * 16}, build_lexical))
    print(f"{len(files)} files in {sys.argv[1]}")
