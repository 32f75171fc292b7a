"""Compares a batch whose rows have prompts of different methods and lengths with the same rows under one prompt.

    python benchmarks/mixed.py --data PATH/TO/classification

The batch has four rows of each of eight tasks, and a prompt for each task: soft tokens, keys and values, or soft tokens
with shifted embeddings, of four lengths. Its predictions are compared with those of each row alone. Then it alternates
with the same batch under one prompt of the mean length; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from measure import measure_seconds
from methods import CONFIGS, sample_rows
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import IGNORE, Batch
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.multitask import MixedCollate, MultitaskDataModule
from lightning_softprompt.methods import DePT, PrefixTuning, PromptBank, PromptTuning
from lightning_softprompt.methods.base import SoftPromptModule

TASKS = ("sst2", "rte", "boolq", "trec6", "ag_news", "cola", "cb", "pubmedqa_cls")
LENGTHS = (5, 10, 20, 40)
KINDS: Sequence[Callable[..., SoftPromptModule]] = (
    PromptTuning, partial(PrefixTuning, width=None), partial(DePT, rank=4)
)  # fmt: skip


def mix_rows(args: Any) -> Batch:
    """Returns a batch of rows of all tasks in random order."""
    tasks: dict[str, Any] = {}
    for task in TASKS:
        options = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text())["init_args"]
        for split in ("train", "validation", "test"):
            options[split] = sample_rows(str(args.data / task), split, args.rows)
        tasks[task] = ClassificationDataModule(**{**options, "path": None, "max_tokens": args.tokens})
    data = MultitaskDataModule(tasks)
    data.setup("test")
    rows = data.rows_with_tasks("test")
    items = [rows[row] for row in torch.randperm(len(rows)).tolist()]
    return MixedCollate(data.codec, rows.tasks, rows.numbers)(items)


def make_prompt_bank(backbone: Backbone, folder: Path) -> tuple[PromptBank, int]:
    """Returns a prompt for each task, and their mean length."""
    lengths = list(islice(cycle(LENGTHS), len(TASKS)))
    paths = {}
    for task, method_class, length in zip(TASKS, cycle(KINDS), lengths, strict=False):
        method = method_class(backbone=backbone.spec, length=length)
        method.attach(backbone)
        paths[task] = str(folder / f"{task}.safetensors")
        write_prompt(
            Path(paths[task]), SavedPrompt(method.state_dict(), backbone_identity(backbone), dict(method.hparams))
        )
    prompt_bank = PromptBank(paths, backbone=backbone.spec, classes_by_task=dict.fromkeys(TASKS))
    prompt_bank.attach(backbone)
    return prompt_bank, round(sum(lengths) / len(lengths))


def target_logits(batch: Batch, logits: Tensor) -> Tensor:
    """Returns the logits of the targets, [N, V]."""
    return logits[batch.targets != IGNORE]


def compare_rows(mixed: SoftPromptModule, batch: Batch, new: int) -> str:
    """Compares the logits and generated tokens of the batch with those of its rows one by one."""
    rows = [batch.only([b]) for b in range(len(batch))]
    logits = target_logits(batch, mixed.lm()(batch))
    row_logits = torch.cat([target_logits(row, mixed.lm()(row)) for row in rows])
    tokens = mixed.lm().generate(batch, max_new_tokens=new, min_new_tokens=new)
    answers = [mixed.lm().generate(row, max_new_tokens=new, min_new_tokens=new)[0] for row in rows]
    row_tokens = pad_sequence(answers, batch_first=True)
    difference, scale = float((logits - row_logits).abs().max()), float(row_logits.abs().max())
    equal = int((tokens == row_tokens).all(1).sum())
    return f"logits differ by at most {difference:.1e}, of {scale:.1f}; {equal} of {len(rows)} rows generate the same"


def measure_row(sides: Mapping[str, Callable[[], Any]], rounds: int, busy: bool) -> str:
    """Returns a row of the table: median seconds, and the median ratio."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            spent = measure_cpu_seconds(call) if busy else measure_seconds(call)
            if number:  # the first round is warm-up
                times[name].append(spent)
    mixed, one = times.values()
    ratio = median(a / b for a, b in zip(mixed, one, strict=True))
    return f"{median(mixed):.3f} | {median(one):.3f} | **{ratio:.2f}**"


def measure_cpu_seconds(call: Callable[[], Any]) -> float:
    """Measures the CPU seconds of a call, which do not include waiting."""
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    """Prints the comparison of rows, then a table of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--rows", type=int, default=4, help="rows per task")
    parser.add_argument("--tokens", type=int, default=128, help="maximum number of tokens per row")
    parser.add_argument("--new", type=int, default=16, help="generated tokens per row")
    parser.add_argument("--parts", nargs="+", default=["compare", "forward", "generate"], help="parts to run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true", help="measure CPU time, for a machine that others use, too")
    parser.add_argument("--linear-backend", default="auto")
    args = parser.parse_args()
    torch.manual_seed(0)
    backbone, batch = load_backbone(BackboneSpec(linear_backend=args.linear_backend)), mix_rows(args)
    with TemporaryDirectory() as folder:
        mixed, length = make_prompt_bank(backbone, Path(folder))
    one = PromptTuning(length=length, backbone=backbone.spec)
    one.attach(backbone)
    for method in (mixed, one):
        method.eval()
    mean_tokens = float(batch.mask.sum(1).float().mean())
    print(f"{len(batch)} rows of {mean_tokens:.0f} tokens on average; the one prompt has {length} soft tokens")
    if "compare" in args.parts:
        print(compare_rows(mixed, batch, args.new), flush=True)
    print("| | mixed s | one prompt s | ratio |\n|---|---|---|---|")
    options = {"max_new_tokens": args.new, "min_new_tokens": args.new}
    operations: dict[str, Callable[[SoftPromptModule], Any]] = {
        "forward": lambda method: method.lm()(batch),
        "generate": lambda method: method.lm().generate(batch, **options),
    }
    for name in (name for name in operations if name in args.parts):
        sides = {"mixed": partial(operations[name], mixed), "one": partial(operations[name], one)}
        print(f"| {name} | {measure_row(sides, args.rounds, args.busy)} |", flush=True)


if __name__ == "__main__":
    main()
