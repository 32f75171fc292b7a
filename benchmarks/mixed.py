"""A batch in which rows have prompts of different methods and lengths, against the same rows with one prompt for all.

    python benchmarks/mixed.py --data PATH/TO/classification

Four rows of each of eight tasks, and a prompt for each task: soft tokens, keys and values, and soft tokens with shifted
embeddings, of four lengths. What the batch says is compared with what each row says alone; then it and the same batch
with one prompt of the mean length run in turn, and a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from measure import seconds
from methods import CONFIGS, drawn
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


def rows_of_all(args: Any) -> Batch:
    """Rows of each task, mixed."""
    tasks: dict[str, Any] = {}
    for task in TASKS:
        options = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text())["init_args"]
        options |= {split: drawn(str(args.data / task), split, args.rows) for split in ("train", "validation", "test")}
        tasks[task] = ClassificationDataModule(**{**options, "path": None, "max_tokens": args.tokens})
    data = MultitaskDataModule(tasks)
    data.setup("test")
    rows = data.rows_with_tasks("test")
    items = [rows[row] for row in torch.randperm(len(rows)).tolist()]
    return MixedCollate(data.codec, rows.tasks, rows.numbers)(items)


def bank(backbone: Backbone, folder: Path) -> tuple[PromptBank, int]:
    """A prompt for each task, and their mean length."""
    lengths = list(islice(cycle(LENGTHS), len(TASKS)))
    paths = {}
    for task, made, length in zip(TASKS, cycle(KINDS), lengths, strict=False):
        method = made(backbone=backbone.spec, length=length)
        method.attach(backbone)
        paths[task] = str(folder / f"{task}.safetensors")
        write_prompt(
            Path(paths[task]), SavedPrompt(method.state_dict(), backbone_identity(backbone), dict(method.hparams))
        )
    together = PromptBank(paths, backbone=backbone.spec, classes_by_task=dict.fromkeys(TASKS))
    together.attach(backbone)
    return together, round(sum(lengths) / len(lengths))


def said(batch: Batch, logits: Tensor) -> Tensor:
    """Logits [targets, V]."""
    return logits[batch.targets != IGNORE]


def compared(mixed: SoftPromptModule, batch: Batch, new: int) -> str:
    """How far the batch is from its rows one by one."""
    rows = [batch.only([b]) for b in range(len(batch))]
    logits = said(batch, mixed.lm()(batch))
    alone = torch.cat([said(row, mixed.lm()(row)) for row in rows])
    tokens = mixed.lm().generate(batch, max_new_tokens=new, min_new_tokens=new)
    each = pad_sequence([mixed.lm().generate(r, max_new_tokens=new, min_new_tokens=new)[0] for r in rows], True)
    apart, size = float((logits - alone).abs().max()), float(alone.abs().max())
    equal = int((tokens == each).all(1).sum())
    return f"logits differ by {apart:.1e} at most, of {size:.1f}; {equal} of {len(rows)} rows generate the same"


def timed(sides: dict[str, Callable[[], Any]], rounds: int, busy: bool) -> str:
    """A row of the table: medians of seconds, and of the ratio."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            spent = own_seconds(call) if busy else seconds(call)
            times[name] += [spent] if number else []  # the first warms up
    mixed, one = times.values()
    ratio = median(a / b for a, b in zip(mixed, one, strict=True))
    return f"{median(mixed):.3f} | {median(one):.3f} | **{ratio:.2f}**"


def own_seconds(call: Callable[[], Any]) -> float:
    """What this process has of the processors for a call, however long it waits for them."""
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    """Prints how the batch compares, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--rows", type=int, default=4, help="of each of the eight tasks")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of a row")
    parser.add_argument("--new", type=int, default=16, help="tokens generated")
    parser.add_argument("--parts", nargs="+", default=["compare", "forward", "generate"], help="what is done")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true", help="count the process's own seconds: others use the machine")
    parser.add_argument("--linear-backend", default="auto")
    args = parser.parse_args()
    torch.manual_seed(0)
    backbone, batch = load_backbone(BackboneSpec(linear_backend=args.linear_backend)), rows_of_all(args)
    with TemporaryDirectory() as folder:
        mixed, length = bank(backbone, Path(folder))
    one = PromptTuning(length=length, backbone=backbone.spec)
    one.attach(backbone)
    for method in (mixed, one):
        method.eval()
    print(f"{len(batch)} rows of {float(batch.mask.sum(1).float().mean()):.0f} tokens; one prompt has {length}")
    if "compare" in args.parts:
        print(compared(mixed, batch, args.new), flush=True)
    print("| | mixed s | one prompt s | ratio |\n|---|---|---|---|")
    told = {"max_new_tokens": args.new, "min_new_tokens": args.new}
    acts: dict[str, Callable[[SoftPromptModule], Any]] = {
        "forward": lambda method: method.lm()(batch),
        "generate": lambda method: method.lm().generate(batch, **told),
    }
    for name in (name for name in acts if name in args.parts):
        sides = {"mixed": partial(acts[name], mixed), "one": partial(acts[name], one)}
        print(f"| {name} | {timed(sides, args.rounds, args.busy)} |", flush=True)


if __name__ == "__main__":
    main()
