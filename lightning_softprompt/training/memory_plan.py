"""What a run takes of memory, wire and disk, worked out before it is begun, without the backbone's weights.

What a step keeps for its backward pass is not looked up but measured: on a narrow, shallow twin of the backbone, by the
very code that will run, for few short rows. It grows as width, layers, rows and tokens do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.lm_head import CHUNK
from lightning_softprompt.backbones.insertion.layer_stacks import stacks_of
from lightning_softprompt.backbones.kernels.quantized_linear import SCHEMES, matrices
from lightning_softprompt.backbones.skeleton import build_skeleton, load_config
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.training.memory_measurement import Kept, Load, attached, measure

FLOAT = 4  # bytes of what is trained
BOOKS = 28 * 1024  # bytes of a checkpoint that are no numbers of the prompt, most of them states of random numbers


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
    full = build_skeleton(config, spec)
    method = attached(module, full)
    trainable = load.replicas * sum(p.numel() for p in method.parameters() if p.requires_grad)
    whole, layers, largest = weight_bytes(full)
    less, apart = saved_by_quantization(full, spec, load)
    states = optimizer_states(method)
    kept = measure(module, full, config, spec, load)
    training = {
        "frozen weights": whole + (layers - less) // load.shares + (2 * largest if load.shares > 1 else 0),
        "prompt": trainable * FLOAT,
        "gradients": trainable * FLOAT * (2 if load.devices > 1 else 1),  # and the buckets that are sent
        "optimizer": round(trainable * states * FLOAT),
        "weights in the precision of products": 0 if less else cast_copies(full, load),
        "a matrix taken apart": apart,
        "kept for the backward pass": load.replicas * kept_for_backward(kept, full, method, spec, load),
        "a layer at work": round(kept.layer),
        "logits": logits_bytes(full, load),
    }
    wire = on_the_wire(trainable * FLOAT, layers, load)
    start = 0 if load.devices == 1 else trainable * FLOAT
    count = sum(p.numel() for p in full.parameters())
    checkpoint = round(trainable * FLOAT * (2 + states)) + BOOKS * load.devices  # with where the prompt began
    return Plan(trainable, count, training, answering_bytes(full, load, method, kept), wire, start, checkpoint)


def weight_bytes(backbone: Backbone) -> tuple[int, int, int]:
    """Bytes of what each device holds whole, such as embeddings and head; of all layers; and of the largest layer."""
    layers = [list(layer.parameters()) for stack in stacks_of(backbone.model) for layer in stack.layers(backbone.model)]
    in_layers = {id(weight): weight.numel() * weight.element_size() for layer in layers for weight in layer}
    largest = max((sum(in_layers[id(weight)] for weight in layer) for layer in layers), default=0)
    everything = sum(weight.numel() * weight.element_size() for weight in backbone.parameters())
    return everything - sum(in_layers.values()), sum(in_layers.values()), largest


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


def kept_for_backward(kept: Kept, backbone: Backbone, method: SoftPromptModule, spec: BackboneSpec, load: Load) -> int:
    """What a step keeps for its backward pass; only the input of each layer, where layers are recomputed."""
    if not spec.checkpointing:
        return round(kept.step)
    itemsize = (load.autocast or getattr(torch, spec.dtype)).itemsize
    tokens = load.rows * load.tokens + int(getattr(method, "length", 0))
    return kept.depth * tokens * layer_width(backbone) * itemsize


def layer_width(backbone: Backbone) -> int:
    """H of the states between layers, which some models make of narrower embeddings."""
    return backbone.head.layer.weight.shape[1]


def answering_bytes(backbone: Backbone, load: Load, method: SoftPromptModule, kept: Kept) -> dict[str, int]:
    """Keys and values of rows that are answered, and the logits of a token of each."""
    if not load.answers:
        return {}
    length = load.tokens + load.new_tokens + int(getattr(method, "length", 0))
    logits = load.answers * len(backbone.word_embeddings) * FLOAT
    cached = round(load.answers * (length * kept.token + kept.row))
    return {"keys and values of answers": cached, "logits of answers": logits}


def on_the_wire(gradients: int, layers: int, load: Load) -> dict[str, int]:
    """What a device sends in a step: gradients go around a ring twice; layers that are shared out come twice."""

    def twice_around(size: int, devices: int) -> int:
        return round(2 * (devices - 1) / devices * size)

    wire = {"gradients": twice_around(gradients, load.devices)}
    return {**wire, "weights": twice_around(layers, load.shares)} if load.sharded else wire
