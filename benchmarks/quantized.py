"""Compares backbones in 8 and 4 bits with float32 and bfloat16: memory, time, loss and gradient.

    python benchmarks/quantized.py [--dtype float32]

Each one is loaded in a separate process: prompt tuning of the default backbone, 8 film reviews per step, 20 soft
tokens, one thread. Seconds are CPU time, for a step the smaller of two measurements. "Unmodified" uses the matrix
product of torchao instead of this project's. The gradient error is the relative error of the prompt's gradient,
compared with the same weights dequantized into a plain model of the same precision.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from time import process_time
from typing import Any

import torch
from measure import Call, count_saved_bytes, measure_peak_bytes
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
    "saved MB",
    "peak MB",
    "step CPU s",
    "answer CPU s",
    "loss",
    "gradient error",
)


def measure_cpu_seconds(call: Call) -> float:
    """Measures the CPU seconds of a call."""
    start = process_time()
    call()
    return process_time() - start


def load_batch(backbone: Backbone) -> Batch:
    """Returns a batch of film reviews and their sentiments."""
    template = Template("{soft}Review: {text}\nSentiment: {target}")
    rows = read_rows(str(movie_sentences()), "train")
    encoded = []
    for number in range(4 * ROWS):
        row: Any = rows[number]
        pieces = template.pieces({"text": row["text"]})
        encoded.append(backbone.codec.encode(pieces, f" {row['label']}"))
    encoded.sort(key=lambda row: len(row.ids))
    return backbone.codec.collate(encoded[2 * ROWS : 3 * ROWS])


def count_weight_bytes(backbone: Backbone) -> int:
    """Counts the bytes of all parameters, including the scales of quantized ones."""
    total = 0
    for weight in backbone.model.parameters():
        parts = [getattr(weight, name, None) for name in ("qdata", "scale", "SCB")]
        state = getattr(weight, "quant_state", None)
        parts += [getattr(weight, "data", None) if parts[0] is None else None, getattr(state, "absmax", None)]
        total += sum(part.nbytes for part in parts if part is not None)
    return total


def compute_gradient(backbone: Backbone, batch: Batch, tokens: Tensor) -> tuple[float, Tensor]:
    """Returns the loss of a step and the gradient of its prompt."""
    loss = backbone.cross_entropy(batch, SoftPrompt(tokens=tokens)).sum() / (batch.targets >= 0).sum()
    return float(loss.detach()), torch.autograd.grad(loss, tokens)[0]


def load_dequantized(backbone: Backbone, spec: BackboneSpec) -> Backbone:
    """Returns a plain backbone with the dequantized weights."""
    plain = load_backbone(BackboneSpec(name=spec.name, dtype=spec.dtype, linear_backend="plain"))
    for name, quantized_layer in backbone.quantized.items():
        weight = plain.model.get_parameter(name)
        weight.data.copy_(quantized_layer.weight(weight.dtype))
    return plain


def measure_case(dtype: str, kind: str | None, uses_torchao: bool) -> dict[str, str]:
    """Returns a row of the table."""
    torch.set_num_threads(1)
    spec = BackboneSpec(dtype=dtype, quantization=kind, linear_backend="plain")  # type: ignore[arg-type]
    backbone = load_backbone(spec)
    if uses_torchao:
        for quantized_layer in backbone.quantized.values():
            del quantized_layer.layer.forward
    batch = load_batch(backbone)
    tokens = nn.Parameter(torch.randn(1, TOKENS, backbone.hidden_size, generator=torch.Generator().manual_seed(0)))
    loss, gradient = compute_gradient(backbone, batch, tokens)
    step = partial(compute_gradient, backbone, batch, tokens)
    forward = partial(backbone.cross_entropy, batch, SoftPrompt(tokens=tokens))
    answer = partial(backbone.generate, batch, SoftPrompt(tokens=tokens.detach()), max_new_tokens=4)
    numbers = {
        "weights MB": f"{count_weight_bytes(backbone) / 1e6:.0f}",
        "saved MB": f"{count_saved_bytes(forward) / 1e6:.0f}",
        "peak MB": f"{measure_peak_bytes(step) / 1e6:.0f}",
        "step CPU s": f"{min(measure_cpu_seconds(step) for _ in range(2)):.2f}",
        "answer CPU s": f"{measure_cpu_seconds(answer):.2f}",
        "loss": f"{loss:.4f}",
    }
    error = ""
    if kind is not None and not uses_torchao:
        _, expected = compute_gradient(load_dequantized(backbone, spec), batch, tokens)
        relative_error = float((gradient - expected).norm() / expected.norm())
        error = f"{relative_error:.1e}"
    layers = "full" if kind is None else kind
    if uses_torchao:
        layers += ", unmodified"
    return {"dtype": dtype, "layers": layers, **numbers, "gradient error": error}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=int, help="number of a case, which is measured and printed as JSON")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only the cases of this precision")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure_case(*CASES[args.case])))
        return
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for number in (n for n, case in enumerate(CASES) if args.dtype in (None, case[0])):
        command = [sys.executable, __file__, "--case", str(number)]
        result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        line = json.loads(result.stdout.splitlines()[-1])
        print("| " + " | ".join(line[column] for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
