"""What a run takes of memory, wire and disk, worked out before it is begun, without the backbone's weights.

What a step keeps for its backward pass is not looked up but measured: on a narrow, shallow twin of the backbone, by the
very code that will run, for few short rows. It grows as width, layers, rows and tokens do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone, BackboneSpec
from lightning_softprompt.backbones.head import CHUNK
from lightning_softprompt.backbones.hollow import depth_of, hollow, load_config, made_rows, narrowest, twin
from lightning_softprompt.backbones.quantized import SCHEMES, matrices
from lightning_softprompt.module import SoftPromptModule

FLOAT = 4  # bytes of what is trained
BOOKS = 28 * 1024  # bytes of a checkpoint that are no numbers of the prompt, most of them states of random numbers
SHORT, LONG = 24, 48  # tokens of the rows that a twin runs


@dataclass(frozen=True)
class Load:
    """What a run asks of each device.

    Args:
        rows: B, of a training batch.
        tokens: T of a row, without soft ones.
        targets: U of a row, where the loss looks at the whole vocabulary; 0 where it looks at words of classes.
        devices: How many there are.
        sharded: Whether each holds a share of the frozen layers (FSDP) instead of all (DDP).
        per_copy: How many devices share one copy of the layers; 0 has all share one.
        autocast: Precision of products under mixed precision, or None.
        replicas: Prompts that are trained at once.
        answers: Rows that are answered at once in validation, where text is generated; else 0.
        new_tokens: Most tokens of an answer.
    """

    rows: int
    tokens: int
    targets: int = 0
    devices: int = 1
    sharded: bool = False
    per_copy: int = 0
    autocast: torch.dtype | None = None
    replicas: int = 1
    answers: int = 0
    new_tokens: int = 0

    @property
    def shares(self) -> int:
        """How many devices hold the layers together."""
        return (self.per_copy or self.devices) if self.sharded else 1


@dataclass(frozen=True)
class Plan:
    """The answer, in bytes but for the first two.

    Args:
        trainable: Parameters that are trained.
        frozen: Parameters that are not.
        training: What a device holds in a training step, by name.
        answering: What it holds beside the weights and the prompt while text is generated, by name.
        wire: What a device sends and receives in a step, by name.
        start: What it receives once, before the first.
        checkpoint: The size of one.
    """

    trainable: int
    frozen: int
    training: dict[str, int]
    answering: dict[str, int]
    wire: dict[str, int]
    start: int
    checkpoint: int

    @property
    def peak(self) -> int:
        """What a device must have, beside what its driver takes."""
        kept = sum(self.training[name] for name in ("frozen weights", "prompt", "optimizer"))
        return max(sum(self.training.values()), kept + sum(self.answering.values()))


def plan(module: SoftPromptModule, spec: BackboneSpec, load: Load) -> Plan:
    """What a run takes.

    Args:
        module: The method, before it is built.
        spec: The backbone, of which the configuration must be there.
        load: The rest.

    Raises:
        ValueError: If weights are to be both quantised and shared out.
    """
    config = load_config(spec)
    full = hollow(config, spec)
    method = attached(module, full)
    trainable = load.replicas * sum(p.numel() for p in method.parameters() if p.requires_grad)
    whole, layers, largest = weight_bytes(full)
    less, apart = saved_by_quantization(full, spec, load)
    states = optimizer_states(method)
    kept, layer = kept_bytes(module, config, spec, load)
    training = {
        "frozen weights": whole + (layers - less) // load.shares + (2 * largest if load.shares > 1 else 0),
        "prompt": trainable * FLOAT,
        "gradients": trainable * FLOAT * (2 if load.devices > 1 else 1),  # and the buckets that are sent
        "optimizer": round(trainable * states * FLOAT),
        "weights in the precision of products": 0 if less else cast_copies(full, load),
        "a matrix taken apart": apart,
        "kept for the backward pass": load.replicas * kept,
        "a layer at work": layer,
        "logits": logits_bytes(full, load),
    }
    wire = on_the_wire(trainable * FLOAT, layers, load)
    start = 0 if load.devices == 1 else trainable * FLOAT
    count = sum(p.numel() for p in full.parameters())
    checkpoint = round(trainable * FLOAT * (2 + states)) + BOOKS * load.devices  # with where the prompt began
    return Plan(trainable, count, training, answering_bytes(full, load, method), wire, start, checkpoint)


def attached(module: SoftPromptModule, backbone: Backbone) -> SoftPromptModule:
    """A copy of the method on a backbone; without a readout where a tokenizer of bytes has none of its words."""
    method = deepcopy(module)
    try:
        method.attach(backbone)
    except ValueError:
        method = deepcopy(module)
        method.classes = method.classes_by_task = None
        method.attach(backbone)
    return method


def weight_bytes(backbone: Backbone) -> tuple[int, int, int]:
    """Bytes of what each device holds whole, such as embeddings and head; of all layers; and of the largest layer."""
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m)]
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for many in lists for layer in many]
    return sum(p.numel() * p.element_size() for p in backbone.parameters()) - sum(layers), sum(layers), max(layers)


def saved_by_quantization(backbone: Backbone, spec: BackboneSpec, load: Load) -> tuple[int, int]:
    """Bytes of weights that quantisation saves, and of the largest matrix, which is taken apart for its product."""
    if spec.quantization is None:
        return 0, 0
    if load.shares > 1:
        raise ValueError("quantised weights are not shared out; leave backbone.quantization or the sharding out")
    scheme, held = SCHEMES[spec.quantization], matrices(backbone.model)
    less = sum(weight.numel() * weight.element_size() - scheme.bytes_of(weight) for weight in held)
    return less, max((weight.numel() * weight.element_size() for weight in held), default=0)


def optimizer_states(method: SoftPromptModule) -> float:
    """Numbers that the optimizer keeps for each one trained, seen on a small matrix."""
    probe = nn.Parameter(torch.zeros(64, 64))
    made = method.optimizers_over([{"params": [probe]}])
    optimizer = made[0][0] if isinstance(made, tuple) else made
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    kept = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor) and value.dim()]
    return sum(value.numel() for value in kept) / probe.numel()


def cast_copies(backbone: Backbone, load: Load) -> int:
    """Mixed precision casts weights of another precision, and keeps the copies till the backward pass."""
    if load.autocast is None:
        return 0
    matrices = [m.weight for m in backbone.modules() if isinstance(m, nn.Linear)]
    return sum(w.numel() * load.autocast.itemsize for w in matrices if w.dtype != load.autocast)


def logits_bytes(backbone: Backbone, load: Load) -> int:
    """Logits, their softmax and their gradient, in float32, of the targets that are taken at once."""
    return 3 * FLOAT * min(CHUNK, load.rows * load.targets) * len(backbone.word_embeddings)


def answering_bytes(backbone: Backbone, load: Load, method: SoftPromptModule) -> dict[str, int]:
    """Keys and values of rows that are answered, and the logits of a token of each."""
    if not load.answers:
        return {}
    config = backbone.model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    length = load.tokens + load.new_tokens + int(getattr(method, "length", 0))
    pairs = 2 * depth_of(config) * heads * size * backbone.word_embeddings.element_size()
    logits = load.answers * len(backbone.word_embeddings) * FLOAT
    return {"keys and values of answers": load.answers * length * pairs, "logits of answers": logits}


def on_the_wire(gradients: int, layers: int, load: Load) -> dict[str, int]:
    """What a device sends in a step: gradients go around a ring twice; layers that are shared out come twice."""

    def twice_around(size: int, devices: int) -> int:
        return round(2 * (devices - 1) / devices * size)

    wire = {"gradients": twice_around(gradients, load.devices)}
    return {**wire, "weights": twice_around(layers, load.shares)} if load.sharded else wire


def kept_bytes(module: SoftPromptModule, config: Any, spec: BackboneSpec, load: Load) -> tuple[int, int]:
    """What a step keeps for its backward pass, and what one layer of it keeps or would keep."""
    by, depth = narrowest(config), depth_of(config)
    shallow, deep = (_grown(module, twin(config, spec, by, layers), load) for layers in (2, 3))
    layer = by * (deep - shallow)
    if not spec.checkpointing:
        return round(by * shallow + (depth - 2) * layer), round(layer)
    itemsize = (load.autocast or getattr(torch, spec.dtype)).itemsize
    tokens = load.rows * load.tokens + int(getattr(module, "length", 0))
    return depth * tokens * config.hidden_size * itemsize, round(layer)


def _grown(module: SoftPromptModule, backbone: Backbone, load: Load) -> float:
    """What the step of a twin would keep if it had all rows, and their lengths: a + B (c + b T)."""
    method = attached(module, backbone)
    few, more, longer = (_kept(method, backbone, load, *of) for of in ((2, SHORT), (4, SHORT), (2, LONG)))
    of_token = (longer[1] - few[1]) / (2 * (longer[0] - few[0]))
    of_row = (more[1] - few[1]) / 2
    fixed = few[1] - 2 * of_row
    return fixed + load.rows * (of_row + of_token * (load.tokens - few[0]))


def _kept(method: SoftPromptModule, backbone: Backbone, load: Load, rows: int, tokens: int) -> tuple[float, int]:
    """T of a row, and the bytes that a step keeps."""
    batch = made_rows(backbone, rows, tokens)

    def step() -> Tensor:
        return backbone.states(batch, method.prompt(batch)).hidden.float().sum()

    mixed = torch.autocast("cpu", load.autocast) if load.autocast else nullcontext()
    with torch.no_grad():
        step()  # the first use finds out in which way rows run
    with mixed:
        return float(batch.mask.sum()) / rows, saved_bytes(step, {tuple(p.shape) for p in backbone.parameters()})


def saved_bytes(step: Callable[[], Any], weights: set[tuple[int, ...]]) -> int:
    """Bytes of distinct storages that a step keeps for its backward pass, weights and casts of them left out."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        weight = tuple(tensor.shape) in weights or tuple(tensor.shape)[::-1] in weights
        if (not tensor.is_leaf or tensor.requires_grad) and not (weight and tensor.dim() > 1):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(size for size, _ in kept.values())
