"""Estimates the memory, network traffic and checkpoint size of a run before it starts, without the backbone's weights.

The memory kept for the backward pass is measured, not taken from a formula: a narrow, shallow copy of the backbone runs
the code of a real step on a few short rows, and the result is scaled to the width, layers, rows and tokens of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.lm_head import CHUNK
from lightning_softprompt.backbones.insertion.layer_stacks import stacks_of
from lightning_softprompt.backbones.kernels.quantized_linear import SCHEMES, matrices
from lightning_softprompt.backbones.skeleton import Skeleton
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.methods.optimizers import build_optimizer, trainable_parameters
from lightning_softprompt.training.memory_measurement import MemoryUse, Workload, attach_copy, measure

FLOAT = 4  # bytes of a trainable parameter
CHECKPOINT_OVERHEAD = 28 * 1024  # bytes of a checkpoint besides tensors, mostly states of random number generators


@dataclass(frozen=True)
class Plan:
    """The estimate; all sizes are in bytes.

    Args:
        trainable: Number of trainable parameters.
        frozen: Number of frozen parameters.
        training: Memory of a device in a training step, by name.
        answering: Memory of a device during generation, in addition to weights, prompt and optimizer, by name.
        wire: Bytes that a device sends and receives in a step, by name.
        start: Bytes that a device receives once, before the first step.
        checkpoint: Size of a checkpoint.
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
        """The memory that a device requires, excluding what its driver reserves."""
        permanent = sum(self.training[name] for name in ("frozen weights", "prompt", "optimizer"))
        return max(sum(self.training.values()), permanent + sum(self.answering.values()))


def plan(module: SoftPromptModule, spec: BackboneSpec, workload: Workload) -> Plan:
    """Estimate a run.

    Args:
        module: The method, before it is attached to a backbone.
        spec: The backbone, of which only the configuration is needed.
        workload: The work of each device.

    Raises:
        ValueError: If weights are both quantized and sharded.
    """
    skeleton = Skeleton(spec)
    full = skeleton.full_size
    method = attach_copy(module, full)
    of_method = sum(parameter.numel() for parameter in trainable_parameters(method).values())
    trainable = workload.replicas * of_method
    outside_layers, layers, largest_layer = weight_bytes(full)
    saved, dequantized = quantization_savings(full, spec, workload)
    states = optimizer_states(method)
    memory = measure(module, skeleton, workload)
    gathered = 2 * largest_layer if workload.shares > 1 else 0
    gradient_copies = 2 if workload.devices > 1 else 1  # the buckets that are communicated are a second copy
    activations = backward_bytes(memory, full, method, spec, workload)
    training = {
        "frozen weights": outside_layers + (layers - saved) // workload.shares + gathered,
        "prompt": trainable * FLOAT,
        "gradients": trainable * FLOAT * gradient_copies,
        "optimizer": round(trainable * states * FLOAT),
        "weights cast by autocast": 0 if saved else cast_copies(full, workload),
        "dequantized matrix": dequantized,
        "kept for the backward pass": workload.replicas * activations,
        "one layer in progress": round(memory.layer),
        "logits": logits_bytes(full, workload),
    }
    tensors = round(trainable * FLOAT * (2 + states))  # the prompt, its initial values and the optimizer's states
    return Plan(
        trainable=trainable,
        frozen=sum(p.numel() for p in full.parameters()),
        training=training,
        answering=answering_bytes(full, workload, method, memory),
        wire=traffic_bytes(trainable * FLOAT, layers, workload),
        start=0 if workload.devices == 1 else trainable * FLOAT,
        checkpoint=tensors + CHECKPOINT_OVERHEAD * workload.devices,
    )


def weight_bytes(backbone: Backbone) -> tuple[int, int, int]:
    """Bytes of the weights outside of layers, such as embeddings and head; of all layers; and of the largest layer."""
    sizes = {}
    largest = 0
    for stack in stacks_of(backbone.model):
        for layer in stack.layers(backbone.model):
            of_layer = {id(weight): weight.numel() * weight.element_size() for weight in layer.parameters()}
            sizes.update(of_layer)
            largest = max(largest, sum(of_layer.values()))
    everything = sum(weight.numel() * weight.element_size() for weight in backbone.parameters())
    in_layers = sum(sizes.values())
    return everything - in_layers, in_layers, largest


def quantization_savings(backbone: Backbone, spec: BackboneSpec, workload: Workload) -> tuple[int, int]:
    """Bytes of weights that quantization saves, and of the largest matrix, which is dequantized for its product."""
    if spec.quantization is None:
        return 0, 0
    if workload.shares > 1:
        raise ValueError("quantized weights cannot be sharded; remove backbone.quantization or the sharding")
    scheme, weights = SCHEMES[spec.quantization], matrices(backbone.model)
    sizes = [weight.numel() * weight.element_size() for weight in weights]
    quantized = sum(scheme.bytes_of(weight) for weight in weights)
    return sum(sizes) - quantized, max(sizes, default=0)


def optimizer_states(method: SoftPromptModule) -> float:
    """The number of values that the optimizer stores per trainable parameter, measured on a small matrix."""
    probe = nn.Parameter(torch.zeros(64, 64))
    optimizer = build_optimizer(method.optimizer_factory.make_optimizer, [{"params": [probe]}])
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    states = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor) and value.dim()]
    return sum(state.numel() for state in states) / probe.numel()


def cast_copies(backbone: Backbone, workload: Workload) -> int:
    """Bytes of the weights that mixed precision casts; the copies stay until the backward pass."""
    if workload.autocast is None:
        return 0
    matrices = [m.weight for m in backbone.modules() if isinstance(m, nn.Linear)]
    return sum(w.numel() * workload.autocast.itemsize for w in matrices if w.dtype != workload.autocast)


def logits_bytes(backbone: Backbone, workload: Workload) -> int:
    """Logits, their softmax and their gradient, in float32, of the targets in one chunk.

    Trained rows of the head replace some of the logits in a copy.
    """
    copies = 3 + len(backbone.head.replaced)
    return copies * FLOAT * min(CHUNK, workload.rows * workload.targets) * len(backbone.word_embeddings)


def backward_bytes(
    memory: MemoryUse, backbone: Backbone, method: SoftPromptModule, spec: BackboneSpec, workload: Workload
) -> int:
    """Bytes that a step keeps for its backward pass: with checkpointing, only the input of each layer."""
    if not spec.checkpointing:
        return round(memory.step)
    itemsize = (workload.autocast or getattr(torch, spec.dtype)).itemsize
    tokens = workload.rows * workload.tokens + int(getattr(method, "length", 0))
    return memory.depth * tokens * layer_width(backbone) * itemsize


def layer_width(backbone: Backbone) -> int:
    """H of the states between layers, which may be wider than the embeddings."""
    return backbone.head.layer.weight.shape[1]


def answering_bytes(
    backbone: Backbone, workload: Workload, method: SoftPromptModule, memory: MemoryUse
) -> dict[str, int]:
    """Keys and values of the rows that are generated at once, and the logits of one token of each."""
    if not workload.answers:
        return {}
    length = workload.tokens + workload.new_tokens + int(getattr(method, "length", 0))
    logits = workload.answers * len(backbone.word_embeddings) * FLOAT
    cached = round(workload.answers * (length * memory.token + memory.row))
    return {"keys and values of answers": cached, "logits of answers": logits}


def traffic_bytes(gradients: int, layers: int, workload: Workload) -> dict[str, int]:
    """Bytes that a device sends in a step: a ring all-reduce of gradients, and two all-gathers of sharded layers."""

    def twice_around(size: int, devices: int) -> int:
        return round(2 * (devices - 1) / devices * size)

    wire = {"gradients": twice_around(gradients, workload.devices)}
    return {**wire, "weights": twice_around(layers, workload.shares)} if workload.sharded else wire
