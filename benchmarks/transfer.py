"""Transfers prompts of six source tasks to three target tasks: SPoT, ATTEMPT, MPT and prompt tuning at equal steps.

    python benchmarks/transfer.py --data PATH/TO/classification --out benchmarks/transfer.jsonl \
        --folder RUN --png benchmarks/transfer.png

A prompt is trained for each source from the same initial values, and MPT's shared prompt is distilled from these six.
All methods train the same number of steps on a target. The seed selects training rows, their order, and the initial
values that do not come from sources. The learning rate of prompt tuning is searched with the first seed on validation
rows; SPoT compares the sources with its prompt at the default rate. `full` has `--rows` rows.
Results are appended to `--out`, and a run that is started again skips what is there or in `--folder`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from methods import CONFIGS, MethodFactory, append_record, evaluate, make_replicas, read_records, sample_rows, train
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

SOURCES = ("sst2", "rte", "boolq", "trec6", "ag_news", "cola")
TARGETS = ("cb", "medical_abstracts", "pubmedqa_cls")
SHOTS = ("16", "32", "full")
DEFAULT_RATE, RATES = 5e-3, (1e-3, 5e-3, 2e-2)
LENGTH = 10
BASELINE: MethodFactory = partial(PromptTuning, length=LENGTH)


class Files:
    """The files of trained prompts.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.library = Library(folder / "library")
        self.shared, self.queries = folder / "mpt.safetensors", folder / "queries"
        self.start = folder / "start.safetensors"
        for path in (self.library.folder, self.queries):
            path.mkdir(parents=True, exist_ok=True)

    def query(self, target: str, shots: str) -> Path:
        """Returns the path of the prompt that was trained on a target."""
        return self.queries / f"{target}-{shots}.safetensors"


def load_task(task: str, args: Any, sizes: dict[str, int], seed: int, batch: int) -> ClassificationDataModule:
    """Returns a data module of a task. The seed samples training rows; validation and test rows do not depend on it."""
    options = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text())["init_args"]
    for split, size in sizes.items():
        seed_of_split = seed if split == "train" else 0
        options[split] = sample_rows(str(args.data / task), split, size, seed_of_split)
    options |= {"max_tokens": args.tokens, "batch_size": batch, "eval_batch_size": 32, "seed": seed, "path": None}
    text, question = options["template"].replace("{soft}", "").rsplit("\n", 1)
    options["template"] = f"{text}\n{{soft}}{question}"  # the states of the text before it are cached
    if "truncate" in options:  # pairs: only the first text, which is longer, is truncated
        options |= {"truncate": None, "truncation_side": "start"}
    data = ClassificationDataModule(**options)
    data.setup("fit")
    return data


def load_source(task: str, args: Any) -> ClassificationDataModule:
    """Returns the data module of a source task."""
    return load_task(task, args, {"train": args.source_rows, "validation": 8, "test": 8}, 0, 8)


def load_target(task: str, shots: str, seed: int, args: Any) -> ClassificationDataModule:
    """Returns the data module of a target task with `shots` training rows."""
    count = args.rows if shots == "full" else int(shots)
    return load_task(task, args, {"train": count, "validation": 48, "test": args.test_rows}, seed, args.batch)


def train_prompt(
    make_method: MethodFactory, data: Any, backbone: Backbone, steps: int, rate: float, seed: int
) -> SoftPromptModule:
    """Trains one prompt."""
    replicas: Any = make_replicas(make_method, data, backbone, [seed], [rate])
    train(replicas, data, steps)
    return replicas.methods[0]


def save_prompt(path: Path, method: SoftPromptModule, backbone: Backbone) -> None:
    """Writes the file of a prompt."""
    tensors = {name: p.detach() for name, p in method.named_parameters() if p.requires_grad}
    write_prompt(path, SavedPrompt(tensors, backbone_identity(backbone), dict(method.hparams)))


def train_sources(files: Files, backbone: Backbone, args: Any) -> None:
    """Trains source prompts from the same initial values, and distills MPT's shared prompt from them."""
    if not files.start.is_file():
        data = load_source(SOURCES[0], args)
        replicas: Any = make_replicas(BASELINE, data, backbone, [0], [DEFAULT_RATE])
        save_prompt(files.start, replicas.methods[0], backbone)
    for task in SOURCES:
        if task not in files.library.names:
            method = train_prompt(BASELINE, load_source(task, args), backbone, args.source_steps, DEFAULT_RATE, 0)
            save_prompt(files.library.path(task), method, backbone)
            print(f"source {task} {time.strftime('%T')}", flush=True)
    if files.shared.is_file():
        return
    tasks: dict[str, Any] = {task: load_source(task, args) for task in SOURCES}
    all_sources = MultitaskDataModule(
        tasks, UniformTasks(), together=SharedBatches(args.shared_rows, args.shared_tasks)
    )
    all_sources.setup("fit")
    teachers = Distillation([str(files.library.path(task)) for task in SOURCES], weight=0.9)
    make_method = partial(MPT, length=LENGTH, objective=teachers, classes_by_task=all_sources.classes_by_task)
    save_prompt(
        files.shared, train_prompt(make_method, all_sources, backbone, args.shared_steps, DEFAULT_RATE, 0), backbone
    )
    print(f"MPT {time.strftime('%T')}", flush=True)


def make_methods(files: Files, query: Path) -> dict[str, MethodFactory]:
    """Returns the methods that are compared at the default learning rate."""
    library, shared = files.library, str(files.shared)
    from_library = partial(FromLibrary, query=str(query), folder=str(library.folder))
    sources = [FromCheckpoint(str(library.path(task))) for task in SOURCES]
    return {
        "prompt tuning": BASELINE,
        "SPoT, best": partial(PromptTuning, length=LENGTH, init=from_library(top=1)),
        "SPoT, weighted": partial(PromptTuning, length=LENGTH, init=from_library(top=3)),
        "ATTEMPT": partial(ATTEMPT, length=LENGTH, sources=sources),
        "MPT": partial(MPT, length=LENGTH, init=FromCheckpoint(shared, name="shared"), start=FromTasks(shared)),
    }


def search_rate(files: Files, backbone: Backbone, target: str, shots: str, args: Any) -> dict[str, Any]:
    """Searches the learning rate with the first seed; saves the prompt at the default rate for SPoT."""
    data, query = load_target(target, shots, 0, args), files.query(target, shots)
    validation, test = list(data.val_dataloader()), list(data.test_dataloader())
    losses, results = {}, {}
    for rate in RATES:
        start = time.perf_counter()
        method = train_prompt(BASELINE, data, backbone, args.steps, rate, 0)
        results[str(rate)] = {**evaluate_test(method, test), "seconds": time.perf_counter() - start}
        losses[str(rate)] = evaluate(method, validation)["cross_entropy"]
        if rate == DEFAULT_RATE:
            save_prompt(query, method, backbone)
    sources = {name: soft_tokens(saved, query) for name, saved in files.library.read().items()}
    shares = most_similar(soft_tokens(read_prompt(query), query), sources, len(sources), "rows")
    best = float(min(losses, key=lambda rate: losses[rate]))
    return {"losses": losses, "rate": best, "similarities": shares, "results": results}


def evaluate_sources(files: Files, backbone: Backbone, target: str, args: Any) -> Iterator[dict[str, Any]]:
    """Yields the results of each source prompt on a target without further training."""
    data = load_target(target, "full", 0, args)
    test = list(data.test_dataloader())
    for source in SOURCES:
        make_method = partial(PromptTuning, length=LENGTH, init=FromCheckpoint(str(files.library.path(source))))
        replicas: Any = make_replicas(make_method, data, backbone, [0], [DEFAULT_RATE])
        yield {"method": source, **evaluate_test(replicas.eval().methods[0], test)}


def evaluate_test(method: SoftPromptModule, test: list[Any]) -> dict[str, float]:
    """Returns the metrics of a test that are recorded."""
    result = evaluate(method, test)
    return {name: result[name] for name in ("accuracy", "macro_f1", "cross_entropy")}


def compare_methods(
    files: Files, backbone: Backbone, cell: tuple[str, str, int], search: dict[str, Any], args: Any, records: list[Any]
) -> Iterator[dict[str, Any]]:
    """Yields the results of all methods in a cell (target, number of rows, seed), except those in the records."""
    target, shots, seed = cell
    data = load_target(target, shots, seed, args)
    test = list(data.test_dataloader())
    done = {r["method"]: r for r in records if (r["task"], r["shots"], r.get("seed")) == cell}
    methods = make_methods(files, files.query(target, shots))
    variants = {name: (make_method, DEFAULT_RATE) for name, make_method in methods.items()}
    variants["prompt tuning, retuned"] = (BASELINE, search["rate"])
    searched = dict(search["results"]) if seed == 0 else {}  # results of the search, by rate
    for name, (make_method, rate) in variants.items():
        if name in done:
            continue
        result = searched.get(str(rate)) if make_method is BASELINE else None
        if result is None:
            start = time.perf_counter()
            result = evaluate_test(train_prompt(make_method, data, backbone, args.steps, rate, seed), test)
            result["seconds"] = time.perf_counter() - start
        if make_method is BASELINE:
            searched[str(rate)] = result
        done[name] = {"method": name, "seed": seed, **result}
        yield done[name]


def main() -> None:
    """Runs what has no result yet, then prints the tables and plots them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of results")
    parser.add_argument("--folder", type=Path, required=True, help="folder of trained prompts")
    parser.add_argument(
        "--png", type=Path, help="file of the heat map of accuracies; that of similarities has the suffix -similar"
    )
    for name, default in {
        "steps": 12, "batch": 4, "rows": 200, "test-rows": 48, "tokens": 96, "seeds": 3,
        "source-steps": 30, "source-rows": 400, "shared-steps": 16, "shared-rows": 12, "shared-tasks": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    fast = "bf16" if is_supported(torch.bfloat16) else "auto"
    parser.add_argument(
        "--linear-backend", default=fast, help="matrix products of the backbone (default on this CPU: %(default)s)"
    )
    args = parser.parse_args()
    files, records = Files(args.folder), read_records(args.out)
    for record in run_missing(files, args, records):
        records.append(record)
        append_record(args.out, record)
    print(tables(records))
    if args.png:
        queries = [files.query(target, "full") for target in TARGETS]
        draw(records, files.library, queries, files.start, args.png)


def run_missing(files: Files, args: Any, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Runs what has no result, and yields its records."""
    cells = [(target, shots) for target in TARGETS for shots in SHOTS]
    num_runs = 6 * args.seeds  # methods and seeds of a cell
    num_records = len(TARGETS) * len(SOURCES) + len(cells) * (1 + num_runs)
    if len(records) == num_records:
        return
    backbone = load_backbone(BackboneSpec(linear_backend=args.linear_backend, context_memory=3000))
    train_sources(files, backbone, args)
    for target, shots in cells:
        done = {(record["task"], record["shots"]) for record in records}
        if (target, "none") not in done:
            for result in evaluate_sources(files, backbone, target, args):
                yield {"task": target, "shots": "none", **result}
        searches = {(r["task"], r["shots"]): r for r in records if r["method"] == "search"}
        search = searches.get((target, shots))
        if search is None:
            result = search_rate(files, backbone, target, shots, args)
            search = {"task": target, "shots": shots, "method": "search", **result}
            yield search
        for seed in range(args.seeds):
            for record in compare_methods(files, backbone, (target, shots, seed), search, args, records):
                yield {"task": target, "shots": shots, **record}


if __name__ == "__main__":
    main()
