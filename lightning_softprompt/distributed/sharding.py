"""A backbone in several processes: the same in all of them, and shared out among them where it fits none."""

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
from lightning_softprompt.backbones.skeleton import build_small_copy, random_batch
from lightning_softprompt.backbones.small_copy import max_shrink_factor
from lightning_softprompt.core.backbone_spec import BackboneSpec

log = logging.getLogger(__name__)
SHARES = "shares"  # the dimension of a mesh along which layers are cut
DONE = -1  # instead of the number of a layer


def is_distributed() -> bool:
    """Whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def prepare_for_distributed(root: Any, backbone: Backbone) -> None:
    """Makes a backbone and a Lightning module that has it ready to run in several processes.

    Raises:
        ValueError: If the processes have different ones, or they cannot share one out.
    """
    check_same_weights(backbone)
    root._ddp_params_and_buffers_to_ignore = frozen_names(root)
    if root.device_mesh is not None:
        shard_layers(backbone, root.device_mesh[SHARES])


def check_same_weights(backbone: Backbone) -> None:
    """Sees to it that all processes have loaded the same weights, which nobody sends them.

    Raises:
        ValueError: Naming the processes that have others.
    """
    if not is_distributed():
        return
    seen: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(seen, backbone.fingerprint())
    if others := [rank for rank, print_ in enumerate(seen) if print_ != seen[0]]:
        raise ValueError(
            f"processes {others} loaded other weights for {backbone.spec.name} than process 0 (fingerprints {seen}); "
            f"give all machines the same files, or name backbone.revision"
        )


def global_loss_scale(count: Tensor) -> Tensor | float:
    """What a process's loss is multiplied by, so that the mean over processes is the mean over what all have.

    Answers are of other lengths in each process: as many rows are not as many losses.

    Args:
        count: How many losses this process has.
    """
    if not is_distributed():
        return 1.0
    everywhere = count.float()
    distributed.all_reduce(everywhere)
    return count * distributed.get_world_size() / everywhere.clamp(min=1)


def mean_over_processes(value: Tensor, backbone: Backbone) -> Tensor:
    """Over the processes."""
    if not is_distributed():
        return value
    if backbone.layer_gather is not None:
        backbone.layer_gather.drain()
    mean = value.detach() / distributed.get_world_size()
    distributed.all_reduce(mean)
    return mean


def frozen_names(root: nn.Module) -> list[str]:
    """What of a module no process needs to be sent: all of its backbones but what is trained in them."""
    backbones = [name for name, module in root.named_modules() if isinstance(module, Backbone)]
    trained = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
    named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    return [n for n, _ in named if n not in trained and any(n.startswith(f"{b}.") for b in backbones)]


def spec_for_sharding(root: Any, spec: BackboneSpec) -> BackboneSpec:
    """How a Lightning module's backbone is to be held; one that is shared out has no copies of its weights.

    Raises:
        ValueError: If they are asked for.
    """
    if root.device_mesh is None:
        return spec
    if spec.linear_backend in ("prepacked", "bf16"):
        raise ValueError(
            f"backbone.linear_backend={spec.linear_backend} keeps a copy of all weights in each process, which is what sharing them "
            "out is to avoid; set it to plain"
        )
    if spec.compiled:
        raise ValueError("backbone.compiled does not go with weights that are shared out; leave one of them out")
    return replace(spec, linear_backend="plain")


def shard_layers(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Leaves each process its share of each layer (FSDP2); embeddings and head stay whole.

    A layer is gathered when it runs, forth or back, and let go of after. What looks into the embeddings or scores words
    goes on as it was. Each process may run layers in an order of its own: see `Turns`.

    Args:
        backbone: With all of its weights, in main memory.
        mesh: Of the processes that hold one copy together.

    Raises:
        ValueError: If its weights cannot be cut, or are trained.
    """
    layers: list[nn.Module] = [m for m in backbone.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    _check(backbone, layers)
    backbone.pin_fingerprint()
    small = build_small_copy(backbone.model.config, backbone.spec, max_shrink_factor(backbone.model.config), 4)
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


def _check(backbone: Backbone, layers: list[nn.Module]) -> None:
    if not layers:
        raise ValueError(f"{type(backbone.model).__name__} has no layers that could be shared out; take strategy ddp")
    if any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError("a method that changes the backbone cannot train one that is shared out; take strategy ddp")
    if odd := {str(p.dtype) for layer in layers for p in layer.parameters() if not p.is_floating_point()}:
        raise ValueError(f"weights held as {sorted(odd)} cannot be shared out; take strategy ddp, or no quantization")


@final
class LockstepGather:
    """Lets processes that share layers run them in an order of their own, and how often they like.

    A layer is gathered from all processes, so that all have to be there whenever one of them runs it; but they answer
    questions of other lengths, and have unequally many batches. So before a layer runs, forth or back, each process
    says which it wants, and all gather all that are wanted, in the order of their numbers. Who has nothing left to run
    takes part till nobody has (`finish`), which must come before any other exchange between them.

    Args:
        layers: In the order of their numbers.
        mesh: Of the processes.
    """

    def __init__(self, layers: list[nn.Module], mesh: DeviceMesh) -> None:
        self.layers = layers
        self.size = mesh.size()
        self._group = distributed.new_subgroups_by_enumeration(_groups(mesh), backend="gloo")[0]
        for number, layer in enumerate(layers):  # before FSDP's hooks, so that gradients come here first
            layer.register_forward_hook(lambda _, args, out, number=number: self._watch(number, out))

    def register_hooks(self) -> None:
        """Goes before what FSDP does, once the layers are its own."""
        for number, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda *_, number=number: self.gather(number), prepend=True)
            layer.set_modules_to_backward_prefetch([layer])  # type: ignore[operator]  # nothing but what is agreed on

    def gather(self, number: int) -> None:
        """Gathers a layer, and what others want."""
        with torch.inference_mode(False), torch.no_grad():
            for wanted in self._wanted(number):
                self._gather(wanted, keep=wanted == number)

    def drain(self) -> None:
        """Helps the others till none of them runs a layer any more."""
        with torch.inference_mode(False), torch.no_grad():
            while wanted := self._wanted(DONE):
                for number in wanted:
                    self._gather(number, keep=False)

    def _gather(self, number: int, keep: bool) -> None:
        layer: Any = self.layers[number]
        layer.unshard()
        if not keep:
            layer.reshard()

    def _watch(self, number: int, out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.gather(number))

    def _wanted(self, own: int) -> list[int]:
        said = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(said, torch.tensor([own]), group=self._group)
        return sorted({int(number) for number in said} - {DONE})


def _groups(mesh: DeviceMesh) -> list[list[int]]:
    """The numbers of the processes that hold each copy: those of this mesh, and those beside it."""
    size, world = mesh.size(), distributed.get_world_size()
    return [list(range(first, first + size)) for first in range(0, world, size)]
