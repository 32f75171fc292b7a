"""Training steps and evaluation of prompt tuning, against HF PEFT, side by side in one process.

    python benchmarks/throughput.py --data PATH/TO/classification --threads 1 --quick --json throughput.json

The same weights, the same rows, the same precision, the same place of the prompt (before all else, where PEFT puts it);
loss and prompt gradient are compared before anything is timed. Three sides, interleaved round by round:

* peft: `PeftModelForCausalLM` with attention mask and labels, as its users run it, on the padded batch;
* helped: the same function written by hand as a concatenation, with logits of the target rows only;
* ours: packed rows with a shared head.

`plain` computes all sides with PyTorch's own products; `prepacked` gives ours and the helped side weights laid out for
oneDNN, and `peft_prepacked_s` is PEFT given the same, so that what the algorithm wins and what a faster product wins
stay apart. Floating-point operations and the bytes kept for the backward pass are counted with plain products.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from lightning_softprompt.backbones.base import Backbone, BackboneSpec
from lightning_softprompt.backbones.linear import prepack
from lightning_softprompt.backbones.load import load_backbone
from lightning_softprompt.data.sources import read_rows
from lightning_softprompt.template import Template
from lightning_softprompt.types import IGNORE, Batch, SoftPrompt

TEXTS = {
    "sst2": ("sst2", "{soft}Review: {text}\nSentiment: {target}", "positive"),
    "boolq": ("boolq", "{soft}{text_pair}\nQuestion: {text}?\nAnswer: {target}", "true"),
}
QUICK = [("sst2", 16, 100), ("sst2", 16, 20), ("boolq", 8, 100)]
ALL = [*QUICK, ("boolq", 8, 20), ("sst2", 32, 100), ("sst2", 32, 20)]


@dataclass
class Record:
    """One case, as `--json` writes it; seconds are medians over rounds, the ratio that of the rounds' ratios."""

    phase: str
    text: str
    batch: int
    prompt_length: int
    precision: str
    compute: str
    threads: int
    tokens: int
    ours_s: float
    helped_s: float
    peft_s: float
    peft_prepacked_s: float | None
    ratio: float
    ratio_min: float
    ratio_max: float
    ratio_helped: float
    ours_flops: int
    peft_flops: int
    ours_saved_bytes: int
    peft_saved_bytes: int
    gradient_error: float
    equal: bool


class Sides:
    """The three ways to compute one step, over the same weights."""

    def __init__(self, precision: str, compute: str, length: int) -> None:
        torch.manual_seed(0)
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
        self.ours = load_backbone(BackboneSpec(dtype=dtype, compute=compute))
        self.helped = load_backbone(BackboneSpec(dtype=dtype, compute=compute, packed=False))
        base = load_backbone(BackboneSpec(dtype=dtype, compute="plain")).model
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
        self.peft = get_peft_model(base, config).eval()
        self.tokens = nn.Parameter(self.ours.word_embeddings[:length].detach().float().clone()[None])
        weight = self.peft.prompt_encoder["default"].embedding.weight
        weight.data.copy_(self.tokens[0])
        self.peft_tokens = weight

    def step(self, backbone: Backbone, batch: Batch) -> Callable[[], Tensor]:
        """A training step of ours or of the helped side."""

        def run() -> Tensor:
            self.tokens.grad = None
            logits = backbone(batch, SoftPrompt(tokens=self.tokens))
            loss = cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE)
            loss.backward()
            return loss

        return run

    def peft_step(self, batch: Batch) -> Callable[[], Tensor]:
        """A training step of PEFT."""
        labels = batch.input_ids.masked_fill(batch.source | ~batch.mask, IGNORE)

        def run() -> Tensor:
            self.peft_tokens.grad = None
            loss = self.peft(input_ids=batch.input_ids, attention_mask=batch.mask.long(), labels=labels).loss
            loss.backward()
            return loss

        return run

    def evaluation(self, backbone: Backbone, batch: Batch) -> Callable[[], Tensor]:
        """A batch scored by ours or by the helped side."""
        return torch.no_grad()(lambda: backbone(batch, SoftPrompt(tokens=self.tokens)))

    def peft_evaluation(self, batch: Batch) -> Callable[[], Tensor]:
        """A batch scored by PEFT, which gives all logits."""
        return torch.no_grad()(lambda: self.peft(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits)


def batches(backbone: Backbone, folder: Path, text: str, size: int) -> Iterator[Batch]:
    """Random batches of real rows, the prompt before all else."""
    name, template, target = TEXTS[text]
    rows = read_rows(str(folder / name), split="train")
    layout = Template(template)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    for begin in range(0, len(order) - size, size):
        picked = [rows[i] for i in order[begin : begin + size]]
        encoded = [backbone.codec.encode(layout.pieces(row), target, max_tokens=512) for row in picked]
        batch = backbone.codec.collate(encoded)
        batch.slots = torch.zeros_like(batch.slots)
        yield batch


def seconds(call: Callable[[], Tensor]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def saved_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages kept for the backward pass, weights left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(kept.values())


def flops(call: Callable[[], Tensor]) -> int:
    """Floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def counted(length: int, batch: Batch, phase: str) -> dict[str, int]:
    """Operations and kept bytes of ours and of PEFT, with plain products in float32."""
    sides = Sides("fp32", "plain", length)
    ours, peft = (
        (sides.step(sides.ours, batch), sides.peft_step(batch))
        if phase == "train"
        else (sides.evaluation(sides.ours, batch), sides.peft_evaluation(batch))
    )
    ours()
    return {
        "ours_flops": flops(ours),
        "peft_flops": flops(peft),
        "ours_saved_bytes": saved_bytes(ours),
        "peft_saved_bytes": saved_bytes(peft),
    }


def case(
    args: argparse.Namespace, text: str, size: int, length: int, precision: str, compute: str, phase: str
) -> Record:
    """Compares, then times."""
    sides = Sides(precision, compute, length)
    rows = list(islice(batches(sides.ours, args.data, text, size), args.rounds + 1))
    steps = [sides.step(sides.ours, rows[0]), sides.step(sides.helped, rows[0]), sides.peft_step(rows[0])]
    losses = [float(step()) for step in steps]
    sides.step(sides.ours, rows[0])()
    error = float((sides.tokens.grad[0] - sides.peft_tokens.grad).norm() / sides.peft_tokens.grad.norm())
    close = 1e-3 if precision == "fp32" else 0.2
    equal = abs(losses[0] - losses[2]) < close * abs(losses[2]) and error < close
    times: dict[str, list[float]] = {"ours": [], "helped": [], "peft": []}
    for batch in rows[1:]:
        for name, call in calls(sides, batch, phase).items():
            times[name].append(seconds(call))
    packed_peft = None
    if compute == "prepacked":
        prepack(sides.peft.base_model, "prepacked", 576)
        calls(sides, rows[0], phase)["peft"]()
        packed_peft = median(seconds(calls(sides, batch, phase)["peft"]) for batch in rows[1:])
    ratios = [p / o for p, o in zip(times["peft"], times["ours"], strict=True)]
    helped = median(h / o for h, o in zip(times["helped"], times["ours"], strict=True))
    middle = {name: median(values) for name, values in times.items()}
    tokens = int(median(int(batch.mask.sum()) for batch in rows[1:]))
    return Record(
        phase=phase, text=text, batch=size, prompt_length=length, precision=precision, compute=compute,
        threads=args.threads, tokens=tokens, ours_s=middle["ours"], helped_s=middle["helped"], peft_s=middle["peft"],
        peft_prepacked_s=packed_peft, ratio=median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
        ratio_helped=helped, **counted(length, rows[1], phase), gradient_error=error, equal=equal,
    )  # fmt: skip


def calls(sides: Sides, batch: Batch, phase: str) -> dict[str, Callable[[], Tensor]]:
    """One call a side."""
    if phase == "train":
        return {
            "ours": sides.step(sides.ours, batch),
            "helped": sides.step(sides.helped, batch),
            "peft": sides.peft_step(batch),
        }
    return {
        "ours": sides.evaluation(sides.ours, batch),
        "helped": sides.evaluation(sides.helped, batch),
        "peft": sides.peft_evaluation(batch),
    }


COLUMNS = ("phase", "case", "precision", "PEFT s", "ours s", "PEFT / ours", "helped / ours", "PEFT prepacked / ours")
COLUMNS += ("FLOPs PEFT / ours", "kept bytes PEFT / ours", "gradient off by")


def line(r: Record) -> str:
    """A row of the table."""
    cells = [
        r.phase,
        f"{r.text} B={r.batch} l={r.prompt_length}",
        f"{r.precision} {r.compute}",
        f"{r.peft_s:.2f}",
        f"{r.ours_s:.2f}",
        f"**{r.ratio:.2f}** ({r.ratio_min:.2f}-{r.ratio_max:.2f})",
        f"{r.ratio_helped:.2f}",
        "" if r.peft_prepacked_s is None else f"{r.peft_prepacked_s / r.ours_s:.2f}",
        f"{r.peft_flops / r.ours_flops:.2f}",
        f"{r.peft_saved_bytes / r.ours_saved_bytes:.2f}" if r.ours_saved_bytes else "",
        f"{r.gradient_error:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs the cases and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets sst2 and boolq")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="three cases, float32 only")
    parser.add_argument("--phases", nargs="+", default=["train", "eval"])
    parser.add_argument("--json", type=Path, help="writes one record a case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kinds = [("fp32", "plain"), ("fp32", "prepacked")] + ([] if args.quick else [("bf16", "plain")])
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    records = []
    for phase in args.phases:
        for text, size, length in QUICK if args.quick else ALL:
            for precision, compute in kinds:
                records.append(case(args, text, size, length, precision, compute, phase))
                print(line(records[-1]), flush=True)
                if args.json:
                    args.json.write_text(json.dumps([asdict(record) for record in records], indent=1))


if __name__ == "__main__":
    main()
