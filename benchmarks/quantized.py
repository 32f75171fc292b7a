"""Backbones in 8 and 4 bits against float32 and bfloat16: memory of weights and of a step, seconds, loss and gradient.

    python benchmarks/quantized.py [--dtype float32]

Each is loaded in a process of its own: prompt tuning of the packaged backbone, 8 film reviews a step, 20 soft tokens,
one thread. Seconds are of the processor, the least of two, so that other programs on the machine count little.
"As torchao has it" is its own product, without ours. The error is that of the prompt's gradient, relative to the one of
the same weights taken apart into a plain model of the same precision.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from time import process_time

import torch
from measure import Call, peak_bytes, saved_bytes
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.data.readers.sources import read_rows
from lightning_softprompt.data.samples.movie_sentences import movie_sentences

KINDS = (None, "torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4")
CASES = [("float32", kind, False) for kind in KINDS] + [("float32", "torchao-int8", True)]
CASES += [("bfloat16", kind, False) for kind in KINDS]
ROWS, TOKENS = 8, 20
COLUMNS = (
    "dtype",
    "layers",
    "weights MB",
    "kept MB",
    "peak MB",
    "step CPU s",
    "answer CPU s",
    "loss",
    "gradient's error",
)


def of_processor(call: Call) -> float:
    """Seconds that a call takes of the processor."""
    start = process_time()
    call()
    return process_time() - start


def batch_of(backbone: Backbone) -> Batch:
    """Film reviews and what they are."""
    template = Template("{soft}Review: {text}\nSentiment: {target}")
    rows = read_rows(str(movie_sentences()), "train")[: 4 * ROWS]
    encoded = [backbone.codec.encode(template.pieces({"text": row["text"]}), f" {row['label']}") for row in rows]
    return backbone.codec.collate(sorted(encoded, key=lambda row: len(row.ids))[2 * ROWS : 3 * ROWS])


def weights_of(backbone: Backbone) -> int:
    """Bytes of all parameters, of the scales of quantised ones too."""
    held = 0
    for weight in backbone.model.parameters():
        parts = [getattr(weight, name, None) for name in ("qdata", "scale", "SCB")]
        state = getattr(weight, "quant_state", None)
        parts += [getattr(weight, "data", None) if parts[0] is None else None, getattr(state, "absmax", None)]
        held += sum(part.nbytes for part in parts if part is not None)
    return held


def gradient(backbone: Backbone, batch: Batch, tokens: Tensor) -> tuple[float, Tensor]:
    """Loss of a step, and the gradient of its prompt."""
    loss = backbone.cross_entropy(batch, SoftPrompt(tokens=tokens)).sum() / (batch.targets >= 0).sum()
    return float(loss.detach()), torch.autograd.grad(loss, tokens)[0]


def unpacked(backbone: Backbone, spec: BackboneSpec) -> Backbone:
    """A plain backbone with the same weights."""
    plain = load_backbone(BackboneSpec(name=spec.name, dtype=spec.dtype, linear_backend="plain"))
    for name, apart in backbone.quantized.items():
        weight = plain.model.get_parameter(name)
        weight.data.copy_(apart.weight(weight.dtype))
    return plain


def measured(dtype: str, kind: str | None, stock: bool) -> dict[str, str]:
    """A line of the table."""
    torch.set_num_threads(1)
    spec = BackboneSpec(dtype=dtype, quantization=kind, linear_backend="plain")  # type: ignore[arg-type]
    backbone = load_backbone(spec)
    if stock:
        for apart in backbone.quantized.values():
            del apart.layer.forward
    batch = batch_of(backbone)
    tokens = nn.Parameter(torch.randn(1, TOKENS, backbone.hidden_size, generator=torch.Generator().manual_seed(0)))
    loss, found = gradient(backbone, batch, tokens)
    step = lambda: gradient(backbone, batch, tokens)  # noqa: E731
    answer = lambda: backbone.generate(batch, SoftPrompt(tokens=tokens.detach()), max_new_tokens=4)  # noqa: E731
    numbers = {
        "weights MB": f"{weights_of(backbone) / 1e6:.0f}",
        "kept MB": f"{saved_bytes(lambda: backbone.cross_entropy(batch, SoftPrompt(tokens=tokens))) / 1e6:.0f}",
        "peak MB": f"{peak_bytes(step) / 1e6:.0f}",
        "step CPU s": f"{min(of_processor(step) for _ in range(2)):.2f}",
        "answer CPU s": f"{of_processor(answer):.2f}",
        "loss": f"{loss:.4f}",
    }
    error = ""
    if kind is not None and not stock:
        _, wanted = gradient(unpacked(backbone, spec), batch, tokens)
        error = f"{float((found - wanted).norm() / wanted.norm()):.1e}"
    told = "full" if kind is None else f"{kind}, as torchao has it" if stock else kind
    return {"dtype": dtype, "layers": told, **numbers, "gradient's error": error}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=int, help="one line, as JSON")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only these")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measured(*CASES[args.case])))
        return
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for number in (n for n, case in enumerate(CASES) if args.dtype in (None, case[0])):
        told = subprocess.run([sys.executable, __file__, "--case", str(number)], stdout=subprocess.PIPE, check=True)
        line = json.loads(told.stdout.splitlines()[-1])
        print("| " + " | ".join(line[column] for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
