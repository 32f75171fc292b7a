"""How embeddings enter a model: as `inputs_embeds`, or after its embedding module while it reads token ids.

Some models process token ids and `inputs_embeds` differently: they scale the embeddings of token ids, or add to them.
Their soft tokens enter after the embedding module. A trial when a model is loaded determines which of the two applies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.insertion.positions import TableReads, count_learned_positions
from lightning_softprompt.core.refusals import FAILURES, UnsupportedBackboneError, explaining

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative error
HALF_TOLERANCE = 2e-2  # in half precision
TOKENS, SHORT = 12, 8  # lengths of the texts of a trial


class EntryUnsupportedError(UnsupportedBackboneError):
    """A model that soft tokens cannot enter."""


@dataclass(frozen=True)
class Entry:
    """Runs a model on embeddings.

    Args:
        by_ids: Whether the model reads token ids, and embeddings replace the output of its embedding module.
        placeholder: The id that it reads for each token without an id.
    """

    by_ids: bool = False
    placeholder: int = 0

    def run(self, module: Any, embeds: Tensor, ids: Tensor | None = None, stack: Any = None, **inputs: Any) -> Any:
        """Runs a module on embeddings [B, M, H].

        Args:
            module: A model, or a part of it.
            embeds: [B, M, H] as the embedding module computes them.
            ids: [B, M] token ids, from which some models count positions; None reads placeholders.
            stack: The part of the module that reads the input (default: the module).
            inputs: Further inputs of the module.
        """
        if not self.by_ids:
            return module(inputs_embeds=embeds, **inputs)
        if ids is None:
            ids = torch.full(embeds.shape[:2], self.placeholder, device=embeds.device)
        with replace_first_embeddings((stack or module).get_input_embeddings(), embeds):
            return module(input_ids=ids, **inputs)


@contextmanager
def replace_first_embeddings(embedding: nn.Module, embeds: Tensor) -> Iterator[None]:
    """Replaces the output of an embedding module at its first call; a decoder may share it and call it later."""
    is_first = True

    def replace(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        nonlocal is_first
        if not is_first:
            return None
        is_first = False
        return embeds.to(out.dtype, copy=True)  # some models scale it in place

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def check_embeddings(model: Any) -> None:
    """Refuses a model, or a part of one, without an embedding module after which soft tokens can enter.

    Raises:
        UnsupportedBackboneError: With the reason.
    """
    with explaining("soft tokens cannot enter it: transformers does not provide its word embeddings"):
        _ = model.get_input_embeddings().weight.shape


@dataclass(frozen=True)
class EntryTrial:
    """The result of running a model on a few tokens.

    Args:
        entry: How embeddings enter the model.
        positions: Number of tokens for which it has learned positions; None if it has no table of them.
    """

    entry: Entry
    positions: int | None


def find_entry(stack: Any, words: int, start: Sequence[int], placeholder: int, is_causal: bool = False) -> EntryTrial:
    """Determines how embeddings enter a model with the same results as token ids, and its number of positions.

    Args:
        stack: The part of a model that reads the input.
        words: V, the size of its vocabulary.
        start: Special tokens at the start of a row.
        placeholder: The id of `Entry`.
        is_causal: Whether states must not depend on later tokens.

    Raises:
        EntryUnsupportedError: If embeddings cannot enter the model, with the reason.
    """
    check_embeddings(stack)
    device = stack.get_input_embeddings().weight.device
    text = torch.linspace(words // 4, words // 2, TOKENS, device=device).long()
    opening = text.new_tensor(start)
    ids, length = torch.cat([opening, text])[None], len(opening) + SHORT
    placeholders = None if is_causal else torch.cat([opening, torch.full_like(text, placeholder)])[None]
    options = {"use_cache": False} if is_causal else {}
    dtype = str(stack.get_input_embeddings().weight.dtype).removeprefix("torch.")
    with torch.no_grad(), explaining(f"its forward pass on token ids raises an error in {dtype}"):
        with TableReads() as short:
            beginning = states_of(stack(input_ids=ids[:, :length], **options))
        with TableReads() as long:
            expected = states_of(stack(input_ids=ids, **options))
        embeds = stack.get_input_embeddings()(ids)
    if not isinstance(embeds, Tensor):
        raise EntryUnsupportedError(
            f"soft tokens are one tensor, and its embedding module returns a {type(embeds).__name__} of several."
        )
    if is_causal and not _is_close(beginning, expected[:, :length]):
        # Some models scale positions by the length of a row, so the comparison that decides keeps the length.
        changed = ids.clone()
        changed[:, length:] = placeholder
        with torch.no_grad():
            beginning = states_of(stack(input_ids=changed, **options))[:, :length]
    if is_causal and not _is_close(beginning, expected[:, :length]):
        raise EntryUnsupportedError(
            "its states depend on later tokens, so that it would attend to the answer that it predicts."
        )
    long.largest.pop(stack.get_input_embeddings().weight, None)
    positions = count_learned_positions(short, long, TOKENS - SHORT)
    reasons = []
    for entry in (Entry(), Entry(True, placeholder)):
        reasons.append(_find_fault(entry, stack, embeds, expected, {"ids": placeholders, **options}))
        if reasons[-1] is None:
            return EntryTrial(entry, None if positions is None else positions + ids.shape[1] - 1)
    raise EntryUnsupportedError(reasons[1])


def _find_fault(entry: Entry, stack: Any, embeds: Tensor, expected: Tensor, options: dict[str, Any]) -> str | None:
    """Returns the reason why embeddings cannot enter a model; None if they can, and have a gradient.

    One row consists of the embeddings of tokens, the other one of embeddings that no token has.
    """
    ids = options["ids"]
    options = {**options, "ids": ids if ids is None else ids.expand(2, -1)}
    leaf = torch.cat([embeds, embeds * 1.01]).detach().requires_grad_()
    try:
        with torch.enable_grad():
            states = states_of(entry.run(stack, leaf, **options))
            if states.shape[1:] != expected.shape[1:] or not _is_close(states[:1], expected):
                return "it also reads token ids outside of its embedding module, and soft tokens have no ids."
            torch.autograd.grad(states.float().sum(), leaf)
    except FAILURES as error:
        return f"soft tokens cannot enter it, or have no gradient ({_first_line(error)})."
    return None


@torch.no_grad()
def check_attends(stack: Any, words: int, is_causal: bool) -> None:
    """Refuses a model whose tokens do not affect each other, such as MRA without its kernel.

    Args:
        stack: The part of a model that reads the input.
        words: V, the size of its vocabulary.
        is_causal: Whether the stack is a decoder.

    Raises:
        EntryUnsupportedError: If another first token changes no later state.
    """
    options = {"use_cache": False} if is_causal else {}
    device = stack.get_input_embeddings().weight.device
    ids = torch.linspace(words // 4, words // 2, TOKENS, device=device).long()[None]
    other = torch.cat([ids[:, -1:], ids[:, 1:]], dim=1)
    before, after = (states_of(stack(input_ids=row, **options)) for row in (ids, other))
    if torch.equal(before[:, 1:], after[:, 1:]):
        raise EntryUnsupportedError(
            "its states do not depend on the other tokens of a row; its attention may require a kernel that does not "
            "run on this device."
        )


def states_of(output: Any) -> Tensor:
    """Returns the states or logits of a module's output."""
    return output[0]  # type: ignore[no-any-return]


def _is_close(states: Tensor, expected: Tensor) -> bool:
    """Whether states agree; also if the expected ones are not finite, which cannot be compared."""
    limit = TOLERANCE.get(expected.dtype, HALF_TOLERANCE) * expected.abs().max()
    is_close = bool(((states - expected).abs() <= limit).all())
    return is_close or not bool(expected.isfinite().all())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
