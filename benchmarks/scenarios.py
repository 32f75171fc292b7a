"""The commands that `faults.py` interrupts: methods, data modules and training settings on tiny random backbones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

from lightning_softprompt.studies.options import to_arguments

ROWS, STEPS = 22, 9  # 6 batches of 4 per epoch, the last one shorter
LABELS = ("negative", "neutral", "positive")
Options = Mapping[str, Any]


def rows(count: int) -> list[dict[str, Any]]:
    """Returns rows of 2 to 12 words with the columns of all tasks."""
    rows = []
    for n in range(count):
        length = 2 + (5 * n) % 11
        words = [tiny.WORDS[(7 * n + 5 * i) % len(tiny.WORDS)] for i in range(length)]
        text, start = " ".join(words), " ".join(words[:2])
        rows.append({
            "text": text, "label": LABELS[n % 3],
            "document": text, "summary": start,
            "question": " ".join(words[:6]), "answers": [start, words[0]], "positive_ids": [str(n % 7)],
        })  # fmt: skip
    return rows


def write_data(folder: Path) -> None:
    """Writes backbones, splits and a corpus."""
    for family in ("llama", "t5"):
        tiny.save(family, folder / family)
    splits = {"train": rows(ROWS), "validation": rows(7), "test": rows(9), "asked": rows(25)}
    corpus = [{"id": str(n), "text": row["text"]} for n, row in enumerate(rows(7))]
    (folder / "splits").mkdir()
    for name, part in splits.items():
        _write(folder / "splits" / f"{name}.jsonl", part)
    _write(folder / "corpus.jsonl", corpus)


def _write(path: Path, part: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in part))


CLASSIFICATION: Options = {
    "data": "ClassificationDataModule",
    "data.path": "{data}/splits",
    "data.template": "{soft}{text} it is{target}",
    "data.labels": {"negative": "bad", "neutral": "one", "positive": "good"},
}
SUMMARIES: Options = {
    "data": "SummarizationDataModule",
    "data.path": "{data}/splits",
    "data.template": "{soft}{document} : {target}",
    "data.max_target_tokens": 4,
    "data.lead": 0,
    "data.metrics": ["rouge1"],
}
QUESTIONS: Options = {
    "data": "RagQaDataModule",
    "data.path": "{data}/splits",
    "data.corpus": "{data}/corpus.jsonl",
    "data.index_settings": {"encoder": None},
    "data.retriever": "Retriever",
    "data.retriever.index": "{runs}/index",
    "data.retriever.mode": "lexical",
    "data.template": "{passages}{soft}{question} : {target}",
    "data.passages": {"template": "{text} ,", "count": 2},
    "data.max_tokens": 40,
    "data.max_target_tokens": 4,
}
NOISE: Options = {
    "data.passages.noise": {"distractors": 0.5, "no_gold": 0.3, "drop": 0.2},
    "data.passages.order": "shuffled",
    "data.answer_form.training_target": "any",
}


def task(options: Options, batch_size: int) -> dict[str, Any]:
    """Returns a data module as a task of a multitask data module."""
    arguments = {name.removeprefix("data."): value for name, value in options.items() if name != "data"}
    return {"class_path": options["data"], "init_args": {**arguments, "batch_size": batch_size}}


SIZE: Options = {**CLASSIFICATION, "data.template": "{text} is{soft} {target}"}
TASKS: Options = {
    "data": "MultitaskDataModule",
    "data.tasks": {"mood": task(CLASSIFICATION, 2), "size": task(SIZE, 4), "summary": task(SUMMARIES, 2)},
    "data.scores": {"summary": "rouge1"},
}
BATCHES: Options = {"data.batch_size": 4}
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}}
DECAY = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}}


@dataclass(frozen=True)
class Scenario:
    """A command.

    Args:
        options: Options of the command.
        command: `fit`, `test` or `predict`.
        family: Family of the backbone.
        processes: Number of processes.
    """

    options: Options
    command: str = "fit"
    family: str = "llama"
    processes: int = 1

    def argv(self, data: Path, runs: Path, name: str) -> list[str]:
        """Returns the arguments of the command, which are the same for a start and a resume."""
        training = {"trainer.max_epochs": -1, "trainer.max_steps": STEPS, "trainer.log_every_n_steps": 1}
        distributed = {"trainer.strategy": "ddp", "trainer.devices": 2} if self.processes > 1 else {}
        options = {
            **dict.fromkeys(("ckpt_path",) if self.command == "fit" else (), "last"),
            "backbone.name": f"{{data}}/{self.family}",
            "run.folder": "{runs}",
            "run.experiment": name,
            "run.wandb": "disabled",
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": False,
            **(training if self.command == "fit" else {}),
            **distributed,
            **self.options,
        }
        if self.command == "predict":
            options |= {"data.predict": "{data}/splits/asked.jsonl"}
        return [
            self.command,
            *(text.replace("{data}", str(data)).replace("{runs}", str(runs)) for text in to_arguments(options)),
        ]


PROMPT: Options = {"model": "PromptTuning", "model.length": 3}
START: Options = {**PROMPT, "model.init": "Uniform", "model.prompt_dropout": 0.2}
VALIDATED: Options = {"trainer.val_check_interval": 2}
SCENARIOS = {
    "prompt tuning, dropout, random start, accumulation": Scenario(
        {**START, **CLASSIFICATION, **BATCHES, "trainer.accumulate_grad_batches": 2, **VALIDATED}
    ),
    "prompt tuning, validation while gradients add up": Scenario(
        {**START, **CLASSIFICATION, **BATCHES, "trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 3}
    ),
    "prefix tuning, two workers, balanced draws": Scenario(
        {"model": "PrefixTuning", "model.length": 3, "model.width": 16, **CLASSIFICATION, **BATCHES,
         "data.balanced": True, "data.num_workers": 2}
    ),
    "P-tuning v2, class head, schedule, clipping": Scenario(
        {"model": "PTuningV2", "model.length": 3, "model.readout": "ClassHead", "model.optimizer": ADAM,
         "model.scheduler": DECAY, "trainer.gradient_clip_val": 0.1, **CLASSIFICATION, **BATCHES, **VALIDATED}
    ),
    "SMoP mixture with router noise": Scenario(
        {"model": "SMoP", "model.length": 2, "model.experts": 2, **CLASSIFICATION, **BATCHES, **VALIDATED}
    ),
    "XPrompt, pruned and rewound": Scenario(
        {"model": "XPrompt", "model.length": 4, "model.pieces": 4, **CLASSIFICATION, **BATCHES, **VALIDATED,
         "trainer.callbacks": [{"class_path": "Pruning", "init_args": {"after": 3, "measured": 2}}]}
    ),
    "two replicas, dropout": Scenario({**START, "replicas": 2, **CLASSIFICATION, **BATCHES, **VALIDATED}),
    "summaries, T5, batches by tokens": Scenario(
        {**START, **SUMMARIES, "data.batch_tokens": 60, **VALIDATED}, family="t5"
    ),
    "RAG answers, Spring's random lengths, noisy passages, a worker": Scenario(
        {"model": "Spring", "model.length": 4, **QUESTIONS, **NOISE, **BATCHES, "data.num_workers": 1}
    ),
    "MPT on three tasks in shared batches": Scenario(
        {"model": "MPT", "model.length": 3, "model.prompt_dropout": 0.2, **TASKS, "data.together": {"rows": 4},
         "trainer.val_check_interval": 3}
    ),
    "prompt tuning on three tasks by turns, two workers": Scenario(
        {**START, **TASKS, "data.sampling": "Temperature", "data.num_workers": 2, "trainer.val_check_interval": 4}
    ),
    "competence by the loss of the bare backbone, two workers": Scenario(
        {**START, **CLASSIFICATION, **BATCHES, **VALIDATED, "data.num_workers": 2,
         "data.curriculum": {"class_path": "Competence", "init_args": {"difficulty": "BareLoss", "steps": 9}}}
    ),
    "two processes: prompt tuning, dropout, accumulation, self-paced rows": Scenario(
        {**START, **CLASSIFICATION, "data.batch_size": 2, "trainer.accumulate_grad_batches": 2, **VALIDATED,
         "data.curriculum": "SelfPaced"},
        processes=2,
    ),
    "two processes: MPT on three tasks": Scenario(
        {"model": "MPT", "model.length": 3, "model.prompt_dropout": 0.2, **TASKS, "data.together": {"rows": 4},
         "trainer.val_check_interval": 3}, processes=2
    ),
    "two processes: RAG answers, noisy passages": Scenario(
        {"model": "Spring", "model.length": 4, **QUESTIONS, **NOISE, "data.batch_size": 2}, processes=2
    ),
    "two processes: SMoP, two workers each": Scenario(
        {"model": "SMoP", "model.length": 2, "model.experts": 2, **CLASSIFICATION, "data.batch_size": 2,
         "data.num_workers": 2, **VALIDATED}, processes=2
    ),
    "predict: classes, two workers": Scenario(
        {**PROMPT, **CLASSIFICATION, "data.batch_size": 2, "data.num_workers": 2}, "predict"
    ),
    "predict: summaries": Scenario({**PROMPT, **SUMMARIES, "data.batch_size": 2}, "predict", "t5"),
    "predict: RAG answers": Scenario(
        {"model": "Spring", "model.length": 4, **QUESTIONS, "data.batch_size": 2}, "predict"
    ),
    "predict: classes in two processes": Scenario(
        {**PROMPT, **CLASSIFICATION, "data.batch_size": 2}, "predict", processes=2
    ),
    "test: three tasks": Scenario({**PROMPT, **TASKS}, "test"),
}  # fmt: skip
