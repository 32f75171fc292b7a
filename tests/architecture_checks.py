"""What an architecture must do to be supported, each compared with plain transformers that runs one row at a time.

The reference passes token ids and inserts soft tokens after the embedding module: no padding, no batch, no cache.
`CHECKS` maps names to checks; `architecture_table` adds the checks of methods and of generation. A check receives a
`Trial` and raises an error if results differ. No check names an architecture.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import tiny
import torch
from architectures import Architecture, save, tokenizer_for
from torch.nn.functional import cross_entropy

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import FAMILIES, load_backbone
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import UnsupportedBackboneError
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.prompts.init import FromText

TOLERANCE = 1e-5  # relative, of logits, losses and gradients in float32
TEMPLATES = {"front": "{soft}{text} it was {target}", "middle": "the film {text}{soft} it was {target}"}
LENGTH = 4
_words = [word for word in tiny.WORDS if word.isalpha()]
SHORT = ("a warm and funny film", "dull", "it is a sad story about a dog")
LONG = (" ".join(_words * 2), "dull", " ".join(_words[::-1]))  # longer than every window of the sizes
TARGETS = ("very good indeed", "bad", "very sad")
WRONG, CRASHED, REFUSED, EQUAL = "wrong", "crash", "refused", "equal"


class DifferentError(AssertionError):
    """Results that differ from the reference."""


class RefusedError(Exception):
    """A check of a feature that the package refuses for this architecture with a clear message."""


@dataclass(frozen=True)
class Result:
    """Result of a check, or of loading.

    Args:
        verdict: `WRONG`, `CRASHED`, `REFUSED` or `EQUAL`.
        reason: Why results are not equal.
    """

    verdict: str
    reason: str = ""


Check = Callable[["Trial"], None]
CHECKS: dict[str, Check] = {}


def check_of(checks: dict[str, Check]) -> Callable[[Check], Check]:
    """Return a decorator that adds a function to checks under its name."""

    def add(function: Check) -> Check:
        checks[function.__name__] = function
        return function

    return add


check = check_of(CHECKS)


@dataclass
class Trial:
    """One architecture under test.

    Args:
        folder: Folder of its tiny model.
        backbone: The model as this package loads it.
    """

    folder: Path
    backbone: Backbone

    @cached_property
    def reference(self):
        """Plain transformers on the same weights."""
        auto = FAMILIES[type(self.backbone)]
        return auto.from_pretrained(self.folder, dtype=torch.float32).eval().requires_grad_(False)

    @cached_property
    def tokens(self):
        """Soft tokens [1, P, H] with the scale of the embeddings."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            size = self.backbone.embed(torch.arange(5, tiny.V)[None]).detach().pow(2).mean().sqrt()
            return torch.randn(1, LENGTH, self.backbone.hidden_size) * size

    def batch(self, texts=SHORT, template="front"):
        """Return a batch of rows of a template."""
        return tiny.batch_of(self.backbone.codec, TEMPLATES.get(template, template), texts, TARGETS[: len(texts)])

    def rows(self, batch):
        """Return the encoded rows of a batch."""
        return batch.require_encoded()

    def logits(self, batch, tokens=None):
        """Return the logits of the reference [targets of all rows, V], row by row."""
        return torch.cat([self._row(row, tokens) for row in self.rows(batch)])

    def loss(self, batch, tokens=None):
        """Return the mean cross-entropy of the reference."""
        targets = torch.tensor([target for row in self.rows(batch) for target in row.targets])
        return cross_entropy(self.logits(batch, tokens), targets)

    def _row(self, row, tokens):
        slot, length = row.slots[0], 0 if tokens is None else tokens.shape[1]
        ids = [*row.ids[:slot], *[tiny.UNK] * length, *row.ids[slot:]]
        answers = [a + length if a >= slot else a for a in row.answers]
        model = self.reference
        with soft_at(model, slot, tokens):
            if model.config.is_encoder_decoder:
                return self._run_decoder(ids, row.targets)
            if type(self.backbone).__name__ == "MaskedBackbone":
                return model(input_ids=torch.tensor([ids])).logits[0, answers]
            ids = torch.tensor([ids[: max(answers)]])  # nothing is predicted from the last token
            predicting = [answer - 1 for answer in answers]
            return model(input_ids=ids, use_cache=False).logits[0, predicting]

    def _run_decoder(self, ids, targets):
        """Start the decoder as generation does; a forced token is not scored."""
        config = self.reference.generation_config
        start = config.decoder_start_token_id
        opening = [config.bos_token_id if start is None else start]
        opening += [] if config.forced_bos_token_id is None else [config.forced_bos_token_id]
        decoder_ids = torch.tensor([[*opening, *targets[:-1]]])
        out = self.reference(input_ids=torch.tensor([ids]), decoder_input_ids=decoder_ids, use_cache=False)
        return out.logits[0, len(opening) - 1 :]


@contextmanager
def soft_at(model, slot, tokens):
    """Insert soft tokens after the embedding module of the stack that reads the input, at its first call."""
    if tokens is None:
        yield
        return
    stack = model.get_encoder() if model.config.is_encoder_decoder else model
    calls = []

    def put(_, args, out):
        if calls:
            return None
        calls.append(True)
        before, after = out[:, :slot], out[:, slot + tokens.shape[1] :]
        return torch.cat([before, tokens.to(out.dtype), after], dim=1)

    handle = stack.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def close(what, ours, right, tolerance=TOLERANCE):
    """Check that results differ by no more than rounding.

    Raises:
        DifferentError: With the difference.
    """
    if ours.shape != right.shape:
        raise DifferentError(f"{what} has shape {list(ours.shape)}, not {list(right.shape)}")
    error = float((ours - right).abs().max() / right.abs().max().clamp(min=1e-3))
    if not error <= tolerance:
        raise DifferentError(f"{what} differs by {error:.1e}")


def real(batch, logits):
    """[B, U, V] -> [targets of all rows, V]."""
    return tiny.real(batch, logits)


@contextmanager
def refusable(trial):
    """End a check if the package refuses a method, or generation, by name.

    Raises:
        RefusedError: With the message of the package.
    """
    try:
        yield
    except UnsupportedBackboneError as error:
        raise RefusedError(str(error).replace(str(trial.folder), "FOLDER")) from error


def loss_and_gradient(run, tokens):
    """Return a loss and the gradient of soft tokens."""
    leaf = tokens.clone().requires_grad_()
    loss = run(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _steps(trial, texts):
    for template in TEMPLATES:
        batch = trial.batch(texts, template)
        ours = loss_and_gradient(partial(_mean_loss, trial.backbone, batch), trial.tokens)
        right = loss_and_gradient(partial(trial.loss, batch), trial.tokens)
        with torch.no_grad():
            logits = real(batch, trial.backbone(batch, SoftPrompt(tokens=trial.tokens)))
            close(f"evaluation, {template}", logits, trial.logits(batch, trial.tokens))
        close(f"loss, {template}", ours[0], right[0])
        close(f"gradient, {template}", ours[1], right[1], 10 * TOLERANCE)


def _mean_loss(backbone, batch, tokens):
    losses = backbone.cross_entropy(batch, SoftPrompt(tokens=tokens))
    return losses.sum() / (batch.targets >= 0).sum()


@check
def bare(trial):
    """The model without a prompt."""
    batch = trial.batch()
    with torch.no_grad():
        close("logits", real(batch, trial.backbone(batch)), trial.logits(batch))


@check
def short(trial):
    """Loss and gradient of soft tokens in short rows."""
    _steps(trial, SHORT)


@check
def long(trial):
    """Loss and gradient of soft tokens in longer rows, after the short ones."""
    _steps(trial, LONG)


@check
def text(trial):
    """Soft tokens initialized from words give the same logits as the words."""
    words = "is this film good ?"
    ids = trial.backbone.codec.ids(words)
    start = FromText(words)(trial.backbone, len(ids))[None]
    soft = trial.batch(template="{soft} {text} it was {target}")
    plain = trial.batch(template=words + TEMPLATES["front"].removeprefix("{soft}"))
    with torch.no_grad():
        ours = trial.backbone(soft, SoftPrompt(tokens=start.to(trial.tokens)))
        close("logits", real(soft, ours), trial.logits(plain))


@check
def padding(trial):
    """More padding on both sides, and single rows, give the same logits."""
    batch, prompt = trial.batch(LONG), SoftPrompt(tokens=trial.tokens)
    wide = tiny.more_padding(batch, 3, 5, trial.backbone.codec.pad_id)
    with torch.no_grad():
        right = real(batch, trial.backbone(batch, prompt))
        close("logits with padding", real(wide, trial.backbone(wide, prompt)), right)
        rows = [tiny.row(batch, b) for b in range(len(batch))]
        alone = [real(row, trial.backbone(row, prompt)) for row in rows]
        close("logits of rows alone", torch.cat(alone), right)


@check
def checkpoint(trial):
    """The backbone has one fingerprint, and a prompt can be folded."""
    first, second = (backbone_identity(load_backbone(trial.backbone.spec)) for _ in range(2))
    if first != second:
        raise DifferentError("the same weights have two fingerprints")
    method = PromptTuning(length=3, backbone=trial.backbone.spec)
    method.attach(trial.backbone)
    close("tokens", method.fold().tokens[0].detach(), method.tokens.detach())


def run(architecture: Architecture, folder: Path, checks=None) -> dict[str, Result]:
    """Return the results by check, or only `load` if the architecture is refused."""
    checks = CHECKS if checks is None else checks
    save(architecture, folder)
    try:
        backbone = load_backbone(BackboneSpec(name=str(folder)))
    except ValueError as error:
        return {"load": Result(REFUSED, str(error).replace(str(folder), "FOLDER"))}
    except Exception as error:
        return {"load": _crash(error)}
    # Some types ignore the tokenizer of the folder and read a byte-level vocabulary.
    backbone.codec = type(backbone.codec)(tokenizer_for(backbone.model.config))
    trial = Trial(folder, backbone)
    return {name: _result(function, trial) for name, function in checks.items()}


def _result(function, trial):
    try:
        function(trial)
    except DifferentError as error:
        return Result(WRONG, str(error))
    except RefusedError as error:
        return Result(REFUSED, str(error))
    except Exception as error:
        return _crash(error)
    return Result(EQUAL)


def _crash(error):
    lines = str(error).strip().splitlines() or [""]
    return Result(CRASHED, f"{type(error).__name__}: {lines[0]}")
