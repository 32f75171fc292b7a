"""Time and peak memory of a step of preference learning and of training with a reward, compared with TRL's trainers.

    OMP_NUM_THREADS=1 python benchmarks/alignment.py --data PATH/TO/hh_helpful_base

On a machine that also runs other programs, `--clock cpu` measures the processor time of the step.

Both sides have the same frozen weights, rows, precision and soft tokens: TRL trains PEFT's prompt tuning. The sides
alternate, and a ratio is the median over rounds. Before that, their outputs are compared: loss and gradient of the
same pairs, or the log-probabilities of the same sampled answers. Rows are truncated to one length, because PEFT's
prompt tuning computes other results for rows that are padded on the left (GRPO, RLOO), and reads the score of a reward
model at the last position, also if it is padding. A step of GRPO and RLOO samples answers, computes their rewards and
the gradient.
"""

from __future__ import annotations

import argparse
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from time import process_time
from typing import Any

import torch
import trl as trl_package
from datasets import Dataset
from measure import CLEAR, measure_peak_bytes, measure_seconds
from peft import PromptTuningConfig, get_peft_model
from sides import DEVICE, SHAPES, Loader, random_llama, restore_transformers_forwards
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.generation.answers import generate_answers
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import IGNORE, Batch
from lightning_softprompt.data.preference import PreferenceDataModule
from lightning_softprompt.data.prompts import PromptDataModule
from lightning_softprompt.data.readers.sources import read_rows
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.objectives.base import Objective
from lightning_softprompt.objectives.policy.grpo import GRPO
from lightning_softprompt.objectives.policy.rloo import RLOO
from lightning_softprompt.objectives.preference.dpo import DPO
from lightning_softprompt.objectives.reward_modeling import RewardModeling
from lightning_softprompt.readouts.reward_head import RewardHead
from lightning_softprompt.rewards.length import Length

trl: Any = trl_package  # its names are not exported explicitly, as mypy requires
TEMPLATE = "{soft}{prompt} {target}"
WORDS = 10  # target of the reward
COLUMNS = (
    "objective",
    "rows",
    "largest difference",
    "TRL s",
    "ours s",
    "ratio",
    "TRL peak MB",
    "ours peak MB",
    "ratio",
)


def length_reward(completions: Sequence[str], **_: Any) -> list[float]:
    """Returns the reward `Length` for TRL."""
    return [-abs(len(text.split()) - WORDS) / WORDS for text in completions]


def make_method(backbone: Backbone, objective: Objective, tokens: Tensor, **options: Any) -> PromptTuning:
    """Returns prompt tuning on a backbone with given soft tokens [P, H]."""
    method = PromptTuning(length=len(tokens), objective=objective, **options)
    method.attach(backbone, seed=1)
    method.tokens.data.copy_(tokens)
    method.start_values.remember()
    return method


def make_peft(model: Any, tokens: Tensor, task: str) -> Any:
    """Returns PEFT's prompt tuning on a model with given soft tokens [P, H]."""
    peft_model: Any = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=len(tokens)))
    peft_model.prompt_encoder["default"].embedding.weight.data.copy_(tokens)
    return peft_model.to(DEVICE)


def trl_options(**options: Any) -> dict[str, Any]:
    """Returns options of TRL's configs: no files, no reports, and no recomputation of activations."""
    common = {"output_dir": mkdtemp(), "report_to": [], "bf16": False, "gradient_checkpointing": False, "max_steps": 1}
    return {**common, "use_cpu": DEVICE.type == "cpu", **options}


def equal_rows(backbone: Backbone, folder: Path, count: int, question: int, answer: int) -> list[dict[str, str]]:
    """Returns pairs whose questions and answers all have the same number of tokens."""
    tokenizer = backbone.codec.tokenizer

    def cut(text: str, tokens: int) -> str | None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        cut_text = str(tokenizer.decode(ids)).strip()
        is_stable = len(tokenizer(cut_text, add_special_tokens=False)["input_ids"]) == tokens
        return cut_text if len(ids) == tokens and is_stable else None

    rows: list[dict[str, str]] = []
    for row in read_rows(str(folder), split="train"):
        texts = {"prompt": cut(row["prompt"], question)}
        texts |= {name: cut(row[name], answer) for name in ("chosen", "rejected")}
        if None not in texts.values() and texts["chosen"] != texts["rejected"]:
            rows.append({name: str(text) for name, text in texts.items()})
        if len(rows) == count:
            break
    return rows


class Task(ABC):
    """A step of an objective on both sides.

    Args:
        load: Loads a copy of the backbone.
        folder: The data.
        args: Options of the command.
    """

    num_rows = 0

    def __init__(self, load: Any, folder: Path, args: argparse.Namespace) -> None:
        self.ours_backbone, self.backbone = load(), restore_transformers_forwards(load())
        self.tokens = self.ours_backbone.word_embeddings[: args.length].detach().float().clone()
        self.rows = equal_rows(self.backbone, folder, args.rows, args.question, args.answer)
        self.spec = BackboneSpec(name=args.tokenizer, start_token="none")

    @abstractmethod
    def ours(self) -> Tensor:
        """Runs our step and returns the loss."""

    @abstractmethod
    def trl(self) -> Tensor:
        """Runs TRL's step and returns the loss."""

    @abstractmethod
    def difference(self) -> float:
        """Returns the largest difference of outputs on the same input."""


class PairTask(Task):
    """A step on pairs: DPO, or a reward model."""

    trainer: Any

    def __init__(self, load: Any, folder: Path, args: argparse.Namespace) -> None:
        super().__init__(load, folder, args)
        data = PreferenceDataModule(
            TEMPLATE, train=self.rows, validation=self.rows, backbone=self.spec, batch_size=len(self.rows), cache=False
        )
        self.batch: Batch = next(iter(data.build_loader("train", "given"))).to(DEVICE)
        self.num_rows = len(self.batch)
        self.method, self.trainer = self.make_sides(args)
        generator = torch.Generator().manual_seed(0)
        change = 0.1 * self.tokens.std().cpu() * torch.randn(self.tokens.shape, generator=generator)
        for weight in (self.method.tokens, self.trl_tokens):  # the policies differ from the reference, their start
            weight.data += change.to(weight)

    @property
    def trl_tokens(self) -> Tensor:
        """The soft tokens [P, H] of TRL's policy."""
        return self.trainer.model.prompt_encoder["default"].embedding.weight  # type: ignore[no-any-return]

    @abstractmethod
    def make_sides(self, args: argparse.Namespace) -> tuple[PromptTuning, Any]:
        """Returns our method and TRL's trainer."""

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """Returns the rows as TRL collates them: all better answers, then all worse answers."""

    def columns(self) -> dict[str, Tensor]:
        """Returns ids, mask, and which tokens are answers, in TRL's order."""
        order = [*range(0, self.num_rows, 2), *range(1, self.num_rows, 2)]
        part = self.batch.only(order)
        is_answer = (~part.source & part.mask).long()
        return {"input_ids": part.input_ids, "attention_mask": part.mask.long(), "completion_mask": is_answer}

    def ours(self) -> Tensor:
        """See `Task.ours`."""
        self.method.zero_grad()
        loss = self.method.step(self.batch)["loss"]
        loss.backward()
        return loss.detach()

    def trl(self) -> Tensor:
        """See `Task.trl`."""
        self.trainer.model.zero_grad()
        loss: Tensor = self.trainer.compute_loss(self.trainer.model, self.inputs())
        loss.backward()
        return loss.detach()

    def difference(self) -> float:
        """See `Task.difference`."""
        loss = abs(float(self.ours() - self.trl()))
        expected, gradient = self.trl_tokens.grad, self.method.tokens.grad
        assert expected is not None
        assert gradient is not None
        return max(loss, float((gradient - expected).abs().max() / expected.abs().max()))


class DpoTask(PairTask):
    """DPO with the start of the run as the reference, whose log-probabilities are computed in each step."""

    def make_sides(self, args: argparse.Namespace) -> tuple[PromptTuning, Any]:
        """See `PairTask.make_sides`."""
        method = make_method(self.ours_backbone, DPO(beta=0.1, reference="start"), self.tokens)
        trainer = trl.DPOTrainer(
            make_peft(self.backbone.model, self.tokens, "CAUSAL_LM"), args=trl.DPOConfig(**trl_options(beta=0.1)),
            processing_class=self.backbone.codec.tokenizer, train_dataset=Dataset.from_list(self.rows),
        )  # fmt: skip
        return method, trainer

    def inputs(self) -> dict[str, Tensor]:
        """See `PairTask.inputs`."""
        return self.columns()

    def ours(self) -> Tensor:
        """Runs the step without cached log-probabilities of the reference, as TRL does by default."""
        vars(self.method.objective).pop("_state", None)
        return super().ours()


class RewardTask(PairTask):
    """A Bradley-Terry reward model with a trained head."""

    def make_sides(self, args: argparse.Namespace) -> tuple[PromptTuning, Any]:
        """See `PairTask.make_sides`."""
        method = make_method(
            self.ours_backbone, RewardModeling(), self.tokens, readout=partial(RewardHead, fit_first=False)
        )
        config = copy.deepcopy(self.backbone.model.config)
        config.num_labels, config.pad_token_id = 1, 0
        with DEVICE:
            model: Any = AutoModelForSequenceClassification.from_config(config)
        model.model = self.backbone.model.model
        assert method.readout is not None
        weight = next(value for value in method.readout.parameters() if value.dim() == 2 or len(value) > 1)
        model.score.weight.data.copy_(weight.detach().view(1, -1))
        peft_model = make_peft(model, self.tokens, "SEQ_CLS")
        trainer = trl.RewardTrainer(
            peft_model, args=trl.RewardConfig(**trl_options()), processing_class=self.backbone.codec.tokenizer,
            train_dataset=Dataset.from_list(self.rows),
        )  # fmt: skip
        return method, trainer

    def inputs(self) -> dict[str, Tensor]:
        """See `PairTask.inputs`."""
        columns = self.columns()
        return {name: columns[name] for name in ("input_ids", "attention_mask")}


class PolicyTask(Task):
    """A complete step of an objective that samples answers, with a reward for their length and no reference."""

    def __init__(self, load: Any, folder: Path, args: argparse.Namespace, objective: Any, trainer: Any) -> None:
        super().__init__(load, folder, args)
        self.count = args.answers
        rows = [{"prompt": row["prompt"]} for row in self.rows]
        self.num_rows = len(rows) * self.count
        data = PromptDataModule(
            TEMPLATE,
            train=rows,
            validation=rows,
            backbone=self.spec,
            batch_size=len(rows),
            cache=False,
            max_target_tokens=args.new,
        )
        self.batch: Batch = next(iter(data.build_loader("train", "given"))).to(DEVICE)
        self.sampling = Decoding(do_sample=True, max_new_tokens=args.new)
        self.method = make_method(
            self.ours_backbone,
            objective(reward=Length(WORDS), answers=self.count, max_new_tokens=args.new),
            self.tokens,
        )
        trainer_class, config_class = trainer
        options = trl_options(
            per_device_train_batch_size=self.num_rows, num_generations=self.count, max_completion_length=args.new,
            beta=0.0,
        )  # fmt: skip
        self.trainer = trainer_class(
            make_peft(self.backbone.model, self.tokens, "CAUSAL_LM"), reward_funcs=length_reward,
            args=config_class(**options), processing_class=self.backbone.codec.tokenizer,
            train_dataset=Dataset.from_list(rows),
        )  # fmt: skip
        self.trainer.current_gradient_accumulation_steps = 1
        self.inputs = [row for row in rows for _ in range(self.count)]

    def ours(self) -> Tensor:
        """See `Task.ours`."""
        self.method.zero_grad()
        loss = self.method.step(self.batch)["loss"]
        loss.backward()
        return loss.detach()

    def trl(self) -> Tensor:
        """See `Task.trl`."""
        self.trainer.model.zero_grad()
        self.trainer._buffered_inputs = None
        return self.trainer.training_step(self.trainer.model, self.inputs, None)  # type: ignore[no-any-return]

    @torch.no_grad()
    def difference(self) -> float:
        """Returns the largest difference of log-probabilities of the same answers, per token."""
        lm = self.method.lm()
        with self.sampling.drawing():
            answered = generate_answers(lm, self.batch, self.count, self.sampling)
        logprobs = lm.logprobs(answered)
        has_target = answered.targets != IGNORE
        width = answered.targets.shape[1]
        questions = self.batch.input_ids.repeat_interleave(self.count, 0)
        completions = answered.targets.masked_fill(~has_target, 0)
        ids, mask = (
            torch.cat([questions, completions], 1),
            torch.cat([torch.ones_like(questions), has_target.long()], 1),
        )
        theirs = self.trainer._get_per_token_logps_and_entropies(self.trainer.model, ids, mask, width)[0]
        return float((theirs - logprobs).where(has_target, 0).abs().max())


TASKS: Mapping[str, Callable[..., Task]] = {
    "DPO": DpoTask,
    "RewardModeling": RewardTask,
    "GRPO": partial(PolicyTask, objective=GRPO, trainer=(trl.GRPOTrainer, trl.GRPOConfig)),
    "RLOO": partial(PolicyTask, objective=RLOO, trainer=(trl.RLOOTrainer, trl.RLOOConfig)),
}


def measure_cpu_seconds(call: Callable[[], object]) -> float:
    """Measures the processor time of a call in all threads."""
    start = process_time()
    call()
    return process_time() - start


CLOCKS: Mapping[str, Callable[[Callable[[], object]], float]] = {"wall": measure_seconds, "cpu": measure_cpu_seconds}


def measure(task: Task, rounds: int, clock: str) -> Mapping[str, Any]:
    """Returns seconds and peak memory of a step of each side, and their ratios."""
    difference = task.difference()
    calls = {"trl": task.trl, "ours": task.ours}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(CLOCKS[clock](call))
    ratio = median(theirs / ours for theirs, ours in zip(times["trl"], times["ours"], strict=True))
    can_measure = DEVICE.type == "cuda" or CLEAR.exists()
    peaks = {name: measure_peak_bytes(call) / 2**20 if can_measure else float("nan") for name, call in calls.items()}
    return {
        "difference": difference, "seconds": {name: median(values) for name, values in times.items()}, "ratio": ratio,
        "peaks": peaks, "peak_ratio": peaks["trl"] / max(peaks["ours"], 1e-9),
    }  # fmt: skip


def format_row(name: str, rows: int, result: Mapping[str, Any]) -> str:
    """Returns a row of the table."""
    seconds, peaks = result["seconds"], result["peaks"]
    cells = [
        name, str(rows), f"{result['difference']:.1e}", f"{seconds['trl']:.2f}", f"{seconds['ours']:.2f}",
        f"**{result['ratio']:.2f}**", f"{peaks['trl']:.0f}", f"{peaks['ours']:.0f}",
        f"**{result['peak_ratio']:.2f}**",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of pairs: prompt, chosen, rejected")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rows", type=int, default=4, help="pairs, or questions")
    parser.add_argument("--question", type=int, default=64, help="tokens of a question")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer of a pair")
    parser.add_argument("--answers", type=int, default=8, help="sampled answers to a question")
    parser.add_argument("--new", type=int, default=16, help="maximum tokens of a sampled answer")
    parser.add_argument("--length", type=int, default=20, help="soft tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="time of the step, or of the processor")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this size instead of the backbone")
    parser.add_argument("--tokenizer", default=BackboneSpec().name, help="the backbone, or its tokenizer for --shape")
    parser.add_argument("--linear-backend", choices=["plain", "auto"], default="plain", help="products of our side")
    args = parser.parse_args()
    source: Loader = random_llama(args.shape, args.tokenizer) if args.shape else load_backbone
    spec = BackboneSpec(name=args.tokenizer, start_token="none", linear_backend=args.linear_backend)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name in args.only:
        task = TASKS[name](lambda: source(spec).to(DEVICE), args.data, args)
        print(format_row(name, task.num_rows, measure(task, args.rounds, args.clock)), flush=True)


if __name__ == "__main__":
    main()
