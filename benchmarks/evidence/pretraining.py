"""Runs the continued pre-training of `pretraining.yaml`, and appends each result to `pretraining.jsonl`.

    python benchmarks/evidence/pretraining.py --data PATH/TO/data

A run trains one method with one seed, and measures the bits of each document of medical and general text, and which
candidate of each cloze question is the likeliest. The backbone is loaded once; each run is a process that is forked
from it, so that no run changes the weights of another. Products are in bfloat16, also those of the bare backbone.
Stopped and started again, the command continues with the first run that has no result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from corpora import write_corpora
from lightning.pytorch import Callback, Trainer, seed_everything
from run_queue import HERE, REPOSITORY, append, describe_machine, lock, read_results, repair

import lightning_softprompt as sp
from lightning_softprompt.__main__ import main as run_command
from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.callbacks.algorithms.consolidation import (
    EWC,
    FILE,
    PARTS,
    Consolidation,
    SynapticIntelligence,
)
from lightning_softprompt.checkpoints.prompt_file import read_prompt, write_prompt
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch, windows_of
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.runs.run_spec import FOLDER_VARIABLE
from lightning_softprompt.system.plain_yaml import read_yaml

RATE_SEED = 0
EVALUATION_BATCH = 16
CLOZE, GENERAL, MEDICAL = "cloze", "general", "medical"
Spec = Mapping[str, Any]
CONSOLIDATIONS: Mapping[str, type[Consolidation]] = {"EWC": EWC, "SynapticIntelligence": SynapticIntelligence}


@dataclass(frozen=True)
class Job:
    """One training and its evaluation.

    Args:
        method: Name of the method.
        seed: Seed of the run.
        rate: Learning rate; None without training.
        selects_rate: Whether the run only serves to select the learning rate, on validation text.
        corpus: Corpus of the training.
        steps: Optimizer steps; 0 without training.
        spec: The entry of the method in `pretraining.yaml`.
    """

    method: str
    seed: int
    rate: float | None
    selects_rate: bool
    corpus: str
    steps: int
    spec: Spec

    @property
    def key(self) -> str:
        """Identifies the job and its settings."""
        return json.dumps(asdict(self), sort_keys=True)


class Pretraining:
    """The runs of `pretraining.yaml`.

    Args:
        config: The contents of the file.
        work: Folder of the corpora, the extended vocabulary and the importance of weights.
    """

    def __init__(self, config: Spec, work: Path) -> None:
        self.config, self.work = config, work
        self.backbone: Backbone | None = None

    def jobs(self, results: Sequence[Spec]) -> list[Job]:
        """Returns all jobs whose learning rate is known, in their order.

        All methods of the first seed precede those of the second one, and the controls come last.
        """
        by_key = {result["key"]: result for result in results}
        rates: dict[str, float | None] = {}
        jobs: list[Job] = []
        for name, spec in self.config["methods"].items():
            candidates = [
                Job(name, RATE_SEED, rate, True, MEDICAL, self.config["rate_steps"], spec)
                for rate in spec.get("rates", [])
            ]
            jobs += candidates
            if all(job.key in by_key for job in candidates):
                best = min(candidates, key=lambda job: by_key[job.key]["validation"], default=None)
                rates[name] = None if best is None else best.rate
        for control in (False, True):
            for seed in self.config["seeds"]:
                for name, spec in self.config["methods"].items():
                    source = spec.get("rate_of", name)
                    trains = spec["model"] != "NoPrompt"
                    is_first = seed == self.config["seeds"][0]
                    if source not in rates or (control and not spec.get("control")) or not (trains or is_first):
                        continue
                    steps = self.config["steps"] if trains else 0
                    corpus = GENERAL if control else MEDICAL
                    jobs.append(Job(name, seed, rates[source], False, corpus, steps, spec))
        return jobs

    def prepare(self, data: Path) -> None:
        """Writes the corpora and the extended vocabulary, and loads the backbone."""
        write_corpora(data, self.work)
        vocabulary = self.work / "vocabulary"
        if not vocabulary.is_dir():
            texts = [str(self.work / "medical_all.jsonl"), "--general", str(self.work / "general_all.jsonl")]
            rows = ["--rows", str(self.config["new_tokens"]), "--out", str(vocabulary)]
            run_command(["vocabulary", "extend", *texts, *rows])
        self.backbone = load_backbone(BackboneSpec(linear_backend="plain"))
        for model in (sp.PromptTuning(length=20), sp.PrefixTuning(length=20, width=128)):
            self._try_paths(model)

    def _try_paths(self, module: SoftPromptModule) -> None:
        """Lets the backbone select its path for the largest batch, so that no run repeats the trial."""
        assert self.backbone is not None
        module.attach(self.backbone, seed=RATE_SEED)
        training: list[Batch] = []
        for corpus in (MEDICAL, GENERAL):
            data = self.data(corpus, RATE_SEED, BackboneSpec(linear_backend="plain"))
            training += data.train_dataloader()
        data.setup("test")
        longest = max(training, key=lambda batch: batch.mask.shape[1])
        largest = max(data.test_dataloader(), key=lambda batch: int(batch.mask.sum()))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for batch in (longest, largest):
                module.lm().cross_entropy(batch)

    def data(self, corpus: str, seed: int, spec: BackboneSpec, replays: bool = False) -> sp.CorpusDataModule:
        """Returns the data of a run; the test has medical text, general text and cloze questions."""
        others = [name for name in (MEDICAL, GENERAL, CLOZE) if name != corpus]
        data = sp.CorpusDataModule(
            path=str(self.work / corpus),
            window=self.config["window"],
            batch_size=self.config["batch_size"],
            eval_batch_size=EVALUATION_BATCH,
            corpora={name: str(self.work / name) for name in others},
            rates={GENERAL: self.config["replay"]} if replays else None,
            backbone=spec,
            seed=seed,
        )
        data.prepare_data()
        data.setup("fit")
        return data

    def measure(self, job: Job) -> dict[str, Any]:
        """Runs a job in this process."""
        seed_everything(job.seed, verbose=False)
        started = time.monotonic()
        extends = bool(job.spec.get("extends_vocabulary"))
        vocabulary = str(self.work / "vocabulary") if extends else None
        spec = BackboneSpec(linear_backend="plain", vocabulary=vocabulary)
        backbone = load_backbone(spec) if extends else self.backbone
        assert backbone is not None
        data = self.data(job.corpus, job.seed, spec, bool(job.spec.get("replays")))
        module = self.make_module(job, data)
        module.attach(backbone, seed=job.seed)
        result: dict[str, Any] = {"trainable_parameters": sum(p.numel() for p in trainable_parameters(module).values())}
        if job.steps:
            result |= self.train(job, module, data)
        result["train_seconds"] = round(time.monotonic() - started, 1)
        if job.selects_rate:
            medical = self.evaluate(module, data, "validation")[MEDICAL]
            return result | {"validation": bits(medical)}
        return result | {"documents": self.evaluate(module, data, "test")}

    def make_module(self, job: Job, data: sp.CorpusDataModule) -> SoftPromptModule:
        """Returns the method of a job."""
        options = {**job.spec.get("options", {}), "data": data}
        if job.rate is not None:
            options["lr"] = job.rate
        return getattr(sp, job.spec["model"])(**options)  # type: ignore[no-any-return]

    def train(self, job: Job, module: SoftPromptModule, data: sp.CorpusDataModule) -> dict[str, Any]:
        """Trains a method, and returns its last training losses."""
        callbacks: list[Callback] = []
        if "consolidation" in job.spec:
            former = str(self.importance(job, module))
            callbacks = [CONSOLIDATIONS[job.spec["consolidation"]](weight=job.spec["weight"], former=former)]
        trainer = make_trainer(job.steps, callbacks)
        trainer.fit(module, datamodule=data)
        names = ("train/loss", "train/penalty/ewc_pull", "train/penalty/synapticintelligence_pull")
        metrics = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        return {"train_metrics": metrics}

    def importance(self, job: Job, module: SoftPromptModule) -> Path:
        """Returns the file of the importance of the weights to general text, which is measured once.

        EWC measures it without training. Synaptic intelligence measures it by a training on general text; the anchor
        are the initial weights in both cases, so that all runs start from the same ones.
        """
        name, rate = job.spec["consolidation"], job.rate
        folder = self.work / f"importance-{name}-{rate}"
        path = folder / "former.safetensors"
        if path.is_file():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[FOLDER_VARIABLE] = str(folder)
        initial = {key: value.detach().clone() for key, value in trainable_parameters(module).items()}
        data = self.data(GENERAL, RATE_SEED, module.spec)
        is_ewc = name == "EWC"
        callback = EWC(rows=self.config["importance_rows"]) if is_ewc else SynapticIntelligence()
        make_trainer(0 if is_ewc else self.config["rate_steps"], [callback]).fit(module, datamodule=data)
        with torch.no_grad():
            for key, value in trainable_parameters(module).items():
                value.copy_(initial[key])
        saved = read_prompt(folder / FILE)
        anchor = {f"{PARTS[1]}/{key}": value for key, value in initial.items()}
        write_prompt(path, replace(saved, tensors={**saved.tensors, **anchor}))
        return path

    @torch.no_grad()
    def evaluate(self, module: SoftPromptModule, data: sp.CorpusDataModule, split: str) -> dict[str, list[list[float]]]:
        """Returns nats and bytes of each document by corpus; of each text for cloze questions."""
        module.eval()
        data.setup("test" if split == "test" else "validate")
        loader = data.test_dataloader() if split == "test" else data.val_dataloader()
        sums: dict[str, dict[int, list[float]]] = {}
        for batch in loader:
            windows = windows_of(batch)
            if split != "test" and all(window.corpus for window in windows):
                continue  # the main corpus selects the learning rate
            with torch.autocast("cpu", torch.bfloat16):
                nats = module.lm().cross_entropy(batch).double().sum(1).tolist()
            for of_window, window in zip(nats, windows, strict=True):
                of_corpus = sums.setdefault(window.corpus or data_name(data), {})
                total = of_corpus.setdefault(window.document, [0.0, 0])
                total[0] += of_window
                total[1] += window.num_bytes
        return {
            name: [[round(nats, 3), size] for _, (nats, size) in sorted(documents.items())]
            for name, documents in sums.items()
        }


def data_name(data: sp.CorpusDataModule) -> str:
    """Returns the name of the main corpus."""
    return Path(str(data.arguments["path"])).name


def make_trainer(steps: int, callbacks: list[Callback]) -> Trainer:
    """Returns a trainer that only trains: no validation, no checkpoints and no logs."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        precision="bf16-mixed",
        callbacks=callbacks,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def bits(documents: Sequence[Sequence[float]]) -> float:
    """Returns the bits per byte of documents.

    >>> bits([[math.log(2), 1], [math.log(2), 3]])
    0.5
    """
    return sum(nats for nats, _ in documents) / math.log(2) / sum(size for _, size in documents)


def run_forked(pretraining: Pretraining, job: Job, report: Path, log: Path) -> dict[str, Any] | None:
    """Runs a job in a forked process and returns its result; None if it fails."""
    report.unlink(missing_ok=True)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return json.loads(report.read_text()) if not status and report.is_file() else None
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
            os.dup2(file.fileno(), sys.stdout.fileno())
        before = resource.getrusage(resource.RUSAGE_SELF)
        result = pretraining.measure(job)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        seconds = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
        result |= {"cpu_seconds": round(seconds, 1), "peak_mb": round(usage.ru_maxrss / 1024)}
        report.write_text(json.dumps(result))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Runs all jobs without a result.

    Raises:
        SystemExit: If a job fails.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all data sets (default: data)")
    parser.add_argument("--experiments", type=Path, default=HERE / "pretraining.yaml", metavar="YAML")
    parser.add_argument("--results", type=Path, default=HERE / "pretraining.jsonl", metavar="JSONL")
    parser.add_argument("--work", type=Path, default=Path("runs/pretraining"), help="folder of the corpora")
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="run these methods only")
    parser.add_argument("--list", action="store_true", help="print the open jobs and exit")
    args = parser.parse_args()
    args.device, args.threads = "cpu", 1
    torch.set_num_threads(args.threads)
    pretraining = Pretraining(read_yaml(args.experiments), args.work.absolute())
    with lock(args.results):
        repair(args.results)
        os.chdir(REPOSITORY)
        failed: set[str] = set()
        while jobs := [job for job in open_jobs(pretraining, args.results, args.methods) if job.key not in failed]:
            if args.list:
                print("\n".join(describe(job) for job in jobs))
                return
            if pretraining.backbone is None:
                pretraining.prepare(args.data)
            job = jobs[0]
            print(f"{datetime.now():%F %T} {describe(job)}", flush=True)
            result = run_forked(pretraining, job, args.work / "result.json", args.work / "log.txt")
            if result is None:
                print(f"failed; see {args.work / 'log.txt'}", flush=True)
                failed.add(job.key)
                continue
            finished = {**describe_machine(args), "finished": f"{datetime.now(UTC):%F %T}"}
            append(args.results, {"key": job.key, **asdict(job), **result, **finished})
    if failed:
        sys.exit(f"{len(failed)} runs failed; see {args.work / 'log.txt'}")
    print("all runs have results")


def open_jobs(pretraining: Pretraining, results: Path, methods: Sequence[str] = ()) -> list[Job]:
    """Returns the jobs without a result whose learning rate is known, of all methods or of some."""
    known = read_results(results)
    done = {result["key"] for result in known}
    return [job for job in pretraining.jobs(known) if job.key not in done and job.method in (methods or [job.method])]


def describe(job: Job) -> str:
    """Describes a job for the log."""
    kind = f"rate {job.rate}" if job.selects_rate else f"seed {job.seed}"
    return f"{job.method}, {kind}, trained on {job.corpus}"


if __name__ == "__main__":
    main()
