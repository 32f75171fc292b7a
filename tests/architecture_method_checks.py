"""Checks of methods and options on an architecture: equal to plain transformers, or refused by name.

`METHODS` maps names to checks; see `architecture_checks`.
"""

from dataclasses import replace

import tiny
import torch
from architecture_checks import LENGTH, TOLERANCE, DifferentError, check_of, close, real, refusable, soft_at

from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.insertion.layers import layers_of
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import LatePromptTuning, PrefixTuning, PromptTuning
from lightning_softprompt.prompts.kv_prefix import NormalKeysValues
from lightning_softprompt.training.memory_measurement import Workload
from lightning_softprompt.training.memory_plan import plan

METHODS = {}
check = check_of(METHODS)
HALF = 0.3  # relative error of a loss in bfloat16


def attach_method(trial, cls, **arguments):
    """Return a method on the backbone, after a check of its requirements on a small copy, as in a run.

    Raises:
        RefusedError: If the method refuses the backbone.
    """
    method = cls(backbone=trial.backbone.spec, **arguments)
    with refusable(trial):
        method.check_backbone()
        method.attach(trial.backbone)
    return method.eval()


def before_all(trial, batch, tokens, at_first_layer=False):
    """Return the logits of the reference with soft tokens before each row, at the input or before the first layer."""
    return torch.cat([_before(trial, row, tokens, at_first_layer) for row in trial.rows(batch)])


def _before(trial, row, tokens, at_first_layer):
    model, length = trial.reference, tokens.shape[1]
    ids = torch.tensor([[*[tiny.UNK] * length, *row.ids[: max(row.answers)]]])
    if not at_first_layer:
        with soft_at(model, 0, tokens):
            logits = model(input_ids=ids, use_cache=False).logits[0]
        return logits[[answer - 1 + length for answer in row.answers]]

    def put(_, args):
        return torch.cat([tokens, args[0][:, length:]], dim=1), *args[1:]

    backbone = trial.backbone
    name = next(name for name, module in backbone.model.named_modules() if module is backbone.stack)
    layers = getattr(*layers_of(model.get_submodule(name)))
    handle = layers[0].register_forward_pre_hook(put)
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits[[answer - 1 + length for answer in row.answers]]


def same_alone(trial, prompt):
    """Check that a batch gives the same logits as each of its rows."""
    batch = trial.batch()
    with torch.no_grad():
        together = real(batch, trial.backbone(batch, prompt))
        rows = [trial.backbone.codec.collate([row]) for row in trial.rows(batch)]
        alone = torch.cat([real(row, trial.backbone(row, prompt)) for row in rows])
        if torch.equal(together, real(batch, trial.backbone(batch))):
            raise DifferentError("the prompt changes nothing")
    close("logits of rows alone", alone, together)


def _for_heads(cached, heads):
    """Return cached keys or values as the attention reads them: JetMoe repeats them for the experts of a token."""
    return cached.repeat(1, heads // cached.shape[1], 1, 1)


@check
def prefix(trial):
    """Keys and values that a decoder computes from soft tokens have the effect of the soft tokens."""
    method = attach_method(trial, PrefixTuning, length=LENGTH, width=None, init=NormalKeysValues(0.5))
    batch = trial.batch()
    if isinstance(trial.backbone, CausalBackbone):
        with torch.no_grad(), soft_at(trial.reference, 0, trial.tokens):
            ids = torch.full((1, LENGTH), tiny.UNK)
            cache = trial.reference(input_ids=ids, use_cache=True).past_key_values
            heads = trial.backbone.attentions["self"].heads
            pairs = [(_for_heads(layer.keys, heads), _for_heads(layer.values, heads)) for layer in cache.layers]
            kv = {"self": dict(enumerate(pairs))}
        with torch.no_grad():
            ours = real(batch, trial.backbone(batch, SoftPrompt(kv=kv)))
            close("logits", ours, before_all(trial, batch, trial.tokens))
    same_alone(trial, method.prompt(batch))


@check
def late(trial):
    """Soft tokens enter before a layer; in a decoder they precede the states of all words."""
    method = attach_method(trial, LatePromptTuning, length=LENGTH, layer=0, generator="free")
    batch, prompt = trial.batch(), SoftPrompt(hidden={0: trial.tokens})
    if isinstance(trial.backbone, CausalBackbone):
        with torch.no_grad():
            right = before_all(trial, batch, trial.tokens, at_first_layer=True)
            close("logits", real(batch, trial.backbone(batch, prompt)), right)
    same_alone(trial, method.prompt(batch))


@check
def states(trial):
    """States that class heads and tag heads read equal the states of single rows."""
    batch, prompt = trial.batch(), SoftPrompt(tokens=trial.tokens)
    with torch.no_grad():
        together = trial.backbone.hidden_states(batch, prompt)[batch.mask]
        rows = [trial.backbone.codec.collate([row]) for row in trial.rows(batch)]
        alone = [trial.backbone.hidden_states(row, prompt)[row.mask] for row in rows]
    close("states of rows alone", together, torch.cat(alone), 10 * TOLERANCE)


@check
def words(trial):
    """Scores of single words are the logits of those words."""
    batch, chosen = trial.batch(), torch.tensor([7, 9, 5])
    with torch.no_grad():
        scores = trial.backbone(batch, SoftPrompt(tokens=trial.tokens), chosen)
        close("scores", real(batch, scores), trial.logits(batch, trial.tokens)[:, chosen])


def reload_backbone(trial, **options):
    """Return the backbone with other options of its spec."""
    backbone = load_backbone(replace(trial.backbone.spec, **options))
    backbone.codec = trial.backbone.codec
    return backbone


def loss_of(trial, backbone):
    """Return loss and gradient of soft tokens."""
    batch = trial.batch()
    tokens = trial.tokens.clone().requires_grad_()
    losses = backbone.cross_entropy(batch, SoftPrompt(tokens=tokens))
    loss = losses.sum() / (batch.targets >= 0).sum()
    return loss.detach(), torch.autograd.grad(loss, tokens)[0]


@check
def recompute(trial):
    """Layers that are recomputed in the backward pass give the same loss and gradient."""
    right, ours = loss_of(trial, trial.backbone), loss_of(trial, reload_backbone(trial, checkpointing=True))
    close("loss", ours[0], right[0])
    close("gradient", ours[1], right[1], 10 * TOLERANCE)


@check
def prepacked(trial):
    """Weights that are reordered for oneDNN give the same loss and gradient."""
    right, ours = loss_of(trial, trial.backbone), loss_of(trial, reload_backbone(trial, linear_backend="prepacked"))
    close("loss", ours[0], right[0])
    close("gradient", ours[1], right[1], 10 * TOLERANCE)


@check
def bfloat16(trial):
    """Weights in bfloat16 give about the same loss."""
    with refusable(trial):
        PromptTuning(backbone=replace(trial.backbone.spec, dtype="bfloat16")).check_backbone()
        half = reload_backbone(trial, dtype="bfloat16")
    ours = loss_of(trial, half)
    close("loss", ours[0].float(), loss_of(trial, trial.backbone)[0], HALF)


@check
def memory(trial):
    """The estimate counts the model's parameters, and a step runs on its copies."""
    spec = BackboneSpec(name=str(trial.folder))
    with refusable(trial):
        estimate = plan(PromptTuning(backbone=spec, length=LENGTH), spec, Workload(2, 32, answers=2, new_tokens=4))
    count = sum(weight.numel() for weight in trial.reference.parameters())
    if estimate.frozen != count:
        raise DifferentError(f"{estimate.frozen} parameters are counted, and there are {count}")
    if not 0 < estimate.training["kept for the backward pass"] < 2**30:
        raise DifferentError(f"{estimate.training['kept for the backward pass']} bytes are kept")
