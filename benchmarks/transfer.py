"""What six source tasks give three target tasks: SPoT, ATTEMPT and MPT against prompt tuning, at equal steps.

    python benchmarks/transfer.py --data PATH/TO/classification --out benchmarks/transfer.jsonl \
        --folder RUN --png benchmarks/transfer.png

A prompt is trained for each source from one start, and MPT's shared prompt is distilled from these six. Every method
trains as many steps on a target for each seed, which draws training rows, their order, and what of the prompt does not
come from sources. Learning rates of prompt tuning are tried with the first seed, on validation rows; its prompt at the
usual rate, from the sources' start, is what SPoT looks up. `full` is a slice too.
Results are added to `--out` as they come; what is there already, or in `--folder`, is not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from methods import CONFIGS, Made, drawn, keep, replicas, scored, train
from transfer_tables import draw, tables

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.kernels.prepacked_linear import is_supported
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.library import Library, soft_tokens
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt, write_prompt
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.multitask import MultitaskDataModule
from lightning_softprompt.data.sampling.shared_batches import SharedBatches
from lightning_softprompt.data.sampling.task_mixing import UniformTasks
from lightning_softprompt.methods import ATTEMPT, MPT, PromptTuning
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.objectives.distillation import Distillation
from lightning_softprompt.prompts.from_checkpoints import FromLibrary, most_similar
from lightning_softprompt.prompts.init import FromCheckpoint
from lightning_softprompt.prompts.task_factors import FromTasks
from lightning_softprompt.training.replicas import ReplicaSpec

SOURCES = ("sst2", "rte", "boolq", "trec6", "ag_news", "cola")
TARGETS = ("cb", "medical_abstracts", "pubmedqa_cls")
SHOTS = ("16", "32", "full")
USUAL, TRIED = 5e-3, (1e-3, 5e-3, 2e-2)
LENGTH = 10
PLAIN: Made = partial(PromptTuning, length=LENGTH)


class Files:
    """What is kept between the parts of a run, and between runs."""

    def __init__(self, folder: Path) -> None:
        self.library = Library(folder / "library")
        self.shared, self.queries = folder / "mpt.safetensors", folder / "queries"
        self.start = folder / "start.safetensors"
        for path in (self.library.folder, self.queries):
            path.mkdir(parents=True, exist_ok=True)

    def query(self, target: str, shots: str) -> Path:
        """Of a target's own prompt."""
        return self.queries / f"{target}-{shots}.safetensors"


def rows_of(task: str, args: Any, sizes: dict[str, int], seed: int, batch: int) -> ClassificationDataModule:
    """Rows of a task: training rows are drawn by the seed, the others are the same for all."""
    options = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text())["init_args"]
    folder, own = str(args.data / task), {"train": seed}
    options |= {split: drawn(folder, split, size, own.get(split, 0)) for split, size in sizes.items()}
    options |= {"max_tokens": args.tokens, "batch_size": batch, "eval_batch_size": 32, "seed": seed, "path": None}
    text, asked = options["template"].replace("{soft}", "").rsplit("\n", 1)
    options["template"] = f"{text}\n{{soft}}{asked}"  # frozen text before it runs once for all steps, methods and tests
    if "truncate" in options:  # pairs: the longer text stands first, and may give way to its last token
        options |= {"truncate": None, "truncation_side": "start"}
    data = ClassificationDataModule(**options)
    data.setup("fit")
    return data


def source_rows(task: str, args: Any) -> ClassificationDataModule:
    """Those of a source."""
    return rows_of(task, args, {"train": args.source_rows, "validation": 8, "test": 8}, 0, 8)


def target_rows(task: str, shots: str, seed: int, args: Any) -> ClassificationDataModule:
    """Those of a target, of which so many train."""
    count = args.rows if shots == "full" else int(shots)
    return rows_of(task, args, {"train": count, "validation": 48, "test": args.test_rows}, seed, args.batch)


def trained(made: Made, data: Any, backbone: Backbone, steps: int, rate: float, seed: int) -> SoftPromptModule:
    """One prompt."""
    one: Any = replicas(made, data, backbone, ReplicaSpec(1, [seed], [rate]))
    train(one, data, steps)
    return one.methods[0]


def save(path: Path, method: SoftPromptModule, backbone: Backbone) -> None:
    """A prompt's file."""
    trained = {name: p.detach() for name, p in method.named_parameters() if p.requires_grad}
    write_prompt(path, SavedPrompt(trained, backbone_identity(backbone), dict(method.hparams)))


def learn_sources(files: Files, backbone: Backbone, args: Any) -> None:
    """The library of source prompts, all from one start, and the prompt that MPT distils from them."""
    if not files.start.is_file():
        one: Any = replicas(PLAIN, source_rows(SOURCES[0], args), backbone, ReplicaSpec(1, [0]))
        save(files.start, one.methods[0], backbone)
    for task in SOURCES:
        if task not in files.library.names:
            method = trained(PLAIN, source_rows(task, args), backbone, args.source_steps, USUAL, 0)
            save(files.library.path(task), method, backbone)
            print(f"source {task} {time.strftime('%T')}", flush=True)
    if files.shared.is_file():
        return
    tasks: dict[str, Any] = {task: source_rows(task, args) for task in SOURCES}
    data = MultitaskDataModule(tasks, UniformTasks(), together=SharedBatches(args.shared_rows, args.shared_tasks))
    data.setup("fit")
    teachers = Distillation([str(files.library.path(task)) for task in SOURCES], weight=0.9)
    made = partial(MPT, length=LENGTH, objective=teachers, classes_by_task=data.classes_by_task)
    save(files.shared, trained(made, data, backbone, args.shared_steps, USUAL, 0), backbone)
    print(f"MPT {time.strftime('%T')}", flush=True)


def methods_for(files: Files, query: Path) -> dict[str, Made]:
    """What is compared at the usual rate."""
    library, shared = files.library, str(files.shared)
    at = partial(FromLibrary, query=str(query), folder=str(library.folder))
    sources = [FromCheckpoint(str(library.path(task))) for task in SOURCES]
    return {
        "prompt tuning": PLAIN,
        "SPoT, best": partial(PromptTuning, length=LENGTH, init=at(top=1)),
        "SPoT, weighted": partial(PromptTuning, length=LENGTH, init=at(top=3)),
        "ATTEMPT": partial(ATTEMPT, length=LENGTH, sources=sources),
        "MPT": partial(MPT, length=LENGTH, init=FromCheckpoint(shared, name="shared"), start=FromTasks(shared)),
    }


def searched(files: Files, backbone: Backbone, target: str, shots: str, args: Any) -> dict[str, Any]:
    """Prompt tuning of the first seed at each rate; leaves the prompt at the usual one, and says what is like it."""
    data, query = target_rows(target, shots, 0, args), files.query(target, shots)
    validation, test = list(data.val_dataloader()), list(data.test_dataloader())
    losses, found = {}, {}
    for rate in TRIED:
        start = time.perf_counter()
        method = trained(PLAIN, data, backbone, args.steps, rate, 0)
        found[str(rate)] = {**results(method, test), "seconds": time.perf_counter() - start}
        losses[str(rate)] = scored(method, validation)["cross_entropy"]
        if rate == USUAL:
            save(query, method, backbone)
    own = {name: soft_tokens(saved, query) for name, saved in files.library.read().items()}
    shares = most_similar(soft_tokens(read_prompt(query), query), own, len(own), "rows")
    best = float(min(losses, key=lambda rate: losses[rate]))
    return {"losses": losses, "rate": best, "likest": shares, "found": found}


def untrained(files: Files, backbone: Backbone, target: str, args: Any) -> Iterator[dict[str, Any]]:
    """Each source's prompt on a target as it is."""
    data = target_rows(target, "full", 0, args)
    test = list(data.test_dataloader())
    for source in SOURCES:
        made = partial(PromptTuning, length=LENGTH, init=FromCheckpoint(str(files.library.path(source))))
        one: Any = replicas(made, data, backbone, ReplicaSpec(1, [0]))
        yield {"method": source, **results(one.eval().methods[0], test)}


def results(method: SoftPromptModule, test: list[Any]) -> dict[str, float]:
    """What is kept of a test."""
    found = scored(method, test)
    return {name: found[name] for name in ("accuracy", "macro_f1", "cross_entropy")}


def compared(
    files: Files, backbone: Backbone, place: tuple[str, str, int], search: dict[str, Any], args: Any, there: list[Any]
) -> Iterator[dict[str, Any]]:
    """Every method on a target with so many rows, for a seed; what is there is left out."""
    target, shots, seed = place
    data = target_rows(target, shots, seed, args)
    test = list(data.test_dataloader())
    done = {r["method"]: r for r in there if (r["task"], r["shots"], r.get("seed")) == place}
    wanted = {name: (made, USUAL) for name, made in methods_for(files, files.query(target, shots)).items()}
    known = dict(search["found"]) if seed == 0 else {}  # what the search has trained already
    for name, (made, rate) in {**wanted, "prompt tuning, retuned": (PLAIN, search["rate"])}.items():
        if name in done:
            continue
        found = known.get(str(rate)) if made is PLAIN else None
        if found is None:
            start = time.perf_counter()
            found = results(trained(made, data, backbone, args.steps, rate, seed), test)
            found["seconds"] = time.perf_counter() - start
        if made is PLAIN:
            known[str(rate)] = found
        done[name] = {"method": name, "seed": seed, **found}
        yield done[name]


def main() -> None:
    """Runs what is not there yet, then prints the tables and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--folder", type=Path, required=True, help="where trained prompts are kept")
    parser.add_argument("--png", type=Path, help="heat maps are drawn here, and beside it with -similar")
    for name, usual in {
        "steps": 12, "batch": 4, "rows": 200, "test-rows": 48, "tokens": 96, "seeds": 3,
        "source-steps": 30, "source-rows": 400, "shared-steps": 16, "shared-rows": 12, "shared-tasks": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=usual)
    fast = "bf16" if is_supported(torch.bfloat16) else "auto"
    parser.add_argument(
        "--linear-backend", default=fast, help="products of the backbone (default on this CPU: %(default)s)"
    )
    args = parser.parse_args()
    files, there = Files(args.folder), []
    if args.out.is_file():
        there = [json.loads(line) for line in args.out.read_text().splitlines()]
    for record in missing(files, args, there):
        there.append(record)
        keep(args.out, record)
    print(tables(there))
    if args.png:
        draw(there, files.library, [files.query(target, "full") for target in TARGETS], files.start, args.png)


def missing(files: Files, args: Any, there: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is not there yet, made one after the other."""
    places = [(target, shots) for target in TARGETS for shots in SHOTS]
    if len(there) == len(TARGETS) * len(SOURCES) + len(places) * (1 + 6 * args.seeds):
        return
    backbone = load_backbone(BackboneSpec(linear_backend=args.linear_backend, context_memory=3000))
    learn_sources(files, backbone, args)
    for target, shots in places:
        if shots == SHOTS[0] and not any(r["task"] == target and r["shots"] == "none" for r in there):
            yield from ({"task": target, "shots": "none", **r} for r in untrained(files, backbone, target, args))
        own = [r for r in there if (r["task"], r["shots"]) == (target, shots)]
        search = next((r for r in own if r["method"] == "search"), None)
        if search is None:
            found = searched(files, backbone, target, shots, args)
            search = {"task": target, "shots": shots, "method": "search", **found}
            yield search
        for seed in range(args.seeds):
            for record in compared(files, backbone, (target, shots, seed), search, args, there):
                yield {"task": target, "shots": shots, **record}


if __name__ == "__main__":
    main()
