"""A backbone in several processes: the same in all of them, or sharded over them if it does not fit on one device."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.skeleton import Skeleton, random_batch
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.distributed.collectives import gather_objects, is_distributed

log = logging.getLogger(__name__)
SHARES = "shares"  # the dimension of a mesh along which layers are sharded
DONE = -1  # in place of the index of a layer


def prepare_for_distributed(root: Any, backbone: Backbone) -> None:
    """Prepares a backbone and its Lightning module to run in several processes.

    Raises:
        ValueError: If the backbones of the processes differ, or the backbone cannot be sharded.
    """
    check_same_weights(backbone)
    root._ddp_params_and_buffers_to_ignore = names_of_frozen_tensors(root)
    if root.device_mesh is not None:
        shard_layers(backbone, root.device_mesh[SHARES])


def check_same_weights(backbone: Backbone) -> None:
    """Checks that all processes loaded the same weights, since frozen weights are never communicated.

    Raises:
        ValueError: Naming the processes whose weights differ.
    """
    if not is_distributed():
        return
    fingerprints = gather_objects(backbone.fingerprint())
    others = [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]
    if others:
        raise ValueError(
            f"processes {others} loaded other weights for {backbone.spec.name} than process 0 (fingerprints "
            f"{fingerprints}); give all machines the same files, or set backbone.revision"
        )


def global_loss_scale(count: Tensor) -> Tensor | float:
    """Returns the factor of a process's loss with which the mean over processes is the mean over all losses.

    Answers differ in length, so that processes with equally many rows have different numbers of losses.

    Args:
        count: Number of losses of this process.
    """
    if not is_distributed():
        return 1.0
    total = count.float()
    distributed.all_reduce(total)
    return count * distributed.get_world_size() / total.clamp(min=1)


def mean_over_processes(value: Tensor, backbone: Backbone) -> Tensor:
    """Returns the mean of a value over all processes."""
    if not is_distributed():
        return value
    wait_for_layers(backbone)
    mean = value.detach() / distributed.get_world_size()
    distributed.all_reduce(mean)
    return mean


def wait_for_layers(backbone: Backbone) -> None:
    """Waits until no process runs sharded layers, as other communication between the processes requires."""
    if backbone.layer_gather is not None:
        backbone.layer_gather.drain()


def sum_over_processes(value: Tensor, backbone: Backbone) -> Tensor:
    """Returns the sum of a value over all processes, without gradient."""
    if not is_distributed():
        return value.detach()
    wait_for_layers(backbone)
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total


def names_of_frozen_tensors(root: nn.Module) -> list[str]:
    """Returns the names of a module's tensors that need no communication: those of backbones that are not trained."""
    backbones = tuple(f"{name}." for name, module in root.named_modules() if isinstance(module, Backbone))
    trainable = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
    parameters, buffers = root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)
    names = [name for name, _ in (*parameters, *buffers)]
    return [name for name in names if name not in trainable and name.startswith(backbones)]


def spec_for_sharding(root: Any, spec: BackboneSpec) -> BackboneSpec:
    """Returns the spec with which a Lightning module's backbone is loaded: without copies of weights if it is sharded.

    Raises:
        ValueError: If an option requires copies of the weights, or compiles sharded layers.
    """
    if root.device_mesh is None:
        return spec
    if spec.linear_backend in ("prepacked", "bf16"):
        raise ValueError(
            f"backbone.linear_backend={spec.linear_backend} stores a copy of all weights in each process, "
            "which sharding avoids; set it to plain"
        )
    if spec.compiled:
        raise ValueError("backbone.compiled does not support sharded weights; remove it, or use trainer.strategy=ddp")
    return replace(spec, linear_backend="plain")


def shard_layers(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shards each layer over the processes (FSDP2); each process holds the full embeddings and head.

    A layer is gathered when it runs, in the forward or in the backward pass, and freed afterwards. Code that reads the
    embeddings or computes logits of words is not affected. Processes may run layers in different orders: see
    `LockstepGather`.

    Args:
        backbone: The backbone, with all of its weights in main memory.
        mesh: The mesh of the processes that hold one copy together.

    Raises:
        ValueError: If its weights cannot be sharded, or are trained.
    """
    layers: list[nn.Module] = [m for m in backbone.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    _check_shardable(backbone, layers)
    backbone.pin_fingerprint()
    skeleton = Skeleton(backbone.spec, backbone.model.config)
    small = skeleton.small_copy(skeleton.shrink_factors[0], layers=4)
    small.use_entry(backbone.entry)
    with torch.no_grad():
        small.states(random_batch(small, 2, 24))
    backbone.adopt_path_of(small)
    backbone.layer_gather = LockstepGather(layers, mesh)
    sharded = {parameter for layer in layers for parameter in layer.parameters()}
    unsharded = set(backbone.model.parameters()) - sharded
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    root: Any = fully_shard(backbone.model, mesh=mesh, ignored_params=unsharded)
    root._get_fsdp_state()._lazy_init()  # layers have one root, whichever part of the model runs first
    backbone.layer_gather.register_hooks()
    sharded_mib = _mebibytes(sharded)
    log.info(
        "sharded %d layers over %d processes: each process holds %.1f of their %.1f MiB, and a full copy of the other "
        "%.1f MiB (embeddings, head); %s",
        len(layers),
        mesh.size(),
        sharded_mib / mesh.size(),
        sharded_mib,
        _mebibytes(unsharded),
        backbone.execution_description,
    )


def _mebibytes(parameters: Iterable[nn.Parameter]) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 2**20


def _check_shardable(backbone: Backbone, layers: list[nn.Module]) -> None:
    if not layers:
        raise ValueError(f"{type(backbone.model).__name__} has no layers to shard; use trainer.strategy=ddp")
    if any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError("a method that changes the backbone cannot shard it; use trainer.strategy=ddp")
    weights = [weight for layer in layers for weight in layer.parameters()]
    other_types = {str(weight.dtype) for weight in weights if not weight.is_floating_point()}
    if other_types:
        raise ValueError(
            f"weights of type {sorted(other_types)} cannot be sharded; use trainer.strategy=ddp, or remove "
            "backbone.quantization"
        )


@final
class LockstepGather:
    """Allows processes that share layers to run them in different orders, and different numbers of times.

    All processes must take part in the gather of a layer whenever one of them runs it, although they generate answers
    of different lengths and have different numbers of batches. Therefore, before a layer runs, in the forward or in the
    backward pass, each process sends the index of the layer that it requests, and all gather all requested layers in
    the order of their indices. A process that has no layer left to run takes part until no process has (`drain`), which
    must come before any other communication between them.

    Args:
        layers: The layers, in the order of their indices.
        mesh: The mesh of the processes.
    """

    def __init__(self, layers: list[nn.Module], mesh: DeviceMesh) -> None:
        self.layers = layers
        self.size = mesh.size()
        self._group = distributed.new_subgroups_by_enumeration(_groups(mesh), backend="gloo")[0]
        for index, layer in enumerate(layers):  # before FSDP's hooks, so that gradients reach this hook first
            layer.register_forward_hook(lambda _, args, out, index=index: self._gather_before_backward(index, out))

    def register_hooks(self) -> None:
        """Gathers each layer before it runs, from now on. Requires that FSDP has sharded the layers."""
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self.gather(index), prepend=True)
            # Without a prefetch, FSDP gathers no layer that the processes have not requested.
            layer.set_modules_to_backward_prefetch([layer])  # type: ignore[operator]

    def gather(self, index: int) -> None:
        """Gathers a layer, and the layers that other processes request."""
        with torch.inference_mode(False), torch.no_grad():
            for requested in self._exchange_requests(index):
                self._gather(requested, keep=requested == index)

    def drain(self) -> None:
        """Joins the gathers of other processes until none of them runs a layer."""
        with torch.inference_mode(False), torch.no_grad():
            while requests := self._exchange_requests(DONE):
                for index in requests:
                    self._gather(index, keep=False)

    def _gather(self, index: int, keep: bool) -> None:
        layer: Any = self.layers[index]
        layer.unshard()
        if not keep:
            layer.reshard()

    def _gather_before_backward(self, index: int, out: Any) -> None:
        """Gathers a layer when its output receives a gradient."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.gather(index))

    def _exchange_requests(self, request: int) -> list[int]:
        """Returns the indices of the layers that the processes request, in order."""
        requests = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(requests, torch.tensor([request]), group=self._group)
        return sorted({int(index) for index in requests} - {DONE})


def _groups(mesh: DeviceMesh) -> list[list[int]]:
    """Returns the ranks of the processes of each copy, of which this mesh is one."""
    size, world = mesh.size(), distributed.get_world_size()
    return [list(range(first, first + size)) for first in range(0, world, size)]
