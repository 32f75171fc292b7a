"""How embeddings enter a model: as `inputs_embeds`, or after its embedding module while it reads token ids.

Some models do more to token ids than to `inputs_embeds`: they scale embeddings, or add to them. Their soft tokens enter
after the embedding module. Which of the two a model needs is tried out when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.insertion.positions import TableReads, learned_positions
from lightning_softprompt.core.refusals import FAILURES, UnsupportedBackboneError, explaining

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative error; half precision has the next one
HALF = 2e-2
TOKENS, SHORT = 12, 8  # of the texts that are tried out


class EntryUnsupportedError(UnsupportedBackboneError):
    """A model that soft tokens cannot enter."""


@dataclass(frozen=True)
class Entry:
    """Runs a model on embeddings.

    Args:
        by_ids: Whether the model reads token ids and embeddings replace what its embedding module gives.
        placeholder: The id that it reads in place of each token that has none.
    """

    by_ids: bool = False
    placeholder: int = 0

    def run(self, module: Any, embeds: Tensor, ids: Tensor | None = None, stack: Any = None, **inputs: Any) -> Any:
        """What a module returns for embeddings [B, M, H].

        Args:
            module: A model, or a part of it.
            embeds: [B, M, H] as the embedding module gives them.
            ids: [B, M] token ids, from which some models count positions; None reads placeholders.
            stack: The part of the module that reads the input; None is the module itself.
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
    """Replaces what an embedding module gives at its first call. A decoder may share the module and call it later."""
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
    """Refuses a model, or a part of one, that has no embedding module to enter after.

    Raises:
        UnsupportedBackboneError: With the reason.
    """
    with explaining("soft tokens have no place to enter: transformers gives no access to its word embeddings"):
        _ = model.get_input_embeddings().weight.shape


@dataclass(frozen=True)
class EntryTrial:
    """What running a model on a few tokens shows.

    Args:
        entry: How embeddings enter it.
        positions: Tokens of a row for which it has learned positions; None where it has no table of them.
    """

    entry: Entry
    positions: int | None


def find_entry(stack: Any, words: int, start: Sequence[int], placeholder: int, is_causal: bool = False) -> EntryTrial:
    """The way in which embeddings give a model what token ids give it, and the positions that it has.

    Args:
        stack: The part of a model that reads the input.
        words: V, the size of its vocabulary.
        start: Special tokens that open a row.
        placeholder: The id of `Entry`.
        is_causal: Whether states must not depend on later tokens.

    Raises:
        EntryUnsupportedError: If there is none, with the reason.
    """
    check_embeddings(stack)
    device = stack.get_input_embeddings().weight.device
    plain = torch.linspace(words // 4, words // 2, TOKENS, device=device).long()
    opening = plain.new_tensor(start)
    ids, length = torch.cat([opening, plain])[None], len(opening) + SHORT
    others = None if is_causal else torch.cat([opening, torch.full_like(plain, placeholder)])[None]
    options = {"use_cache": False} if is_causal else {}
    with torch.no_grad(), explaining("it does not run on token ids alone"):
        with TableReads() as short:
            begin = states_of(stack(input_ids=ids[:, :length], **options))
        with TableReads() as long:
            right = states_of(stack(input_ids=ids, **options))
        embeds = stack.get_input_embeddings()(ids)
    if not isinstance(embeds, Tensor):
        raise EntryUnsupportedError(
            f"soft tokens are one tensor, and its embedding module returns a {type(embeds).__name__} of several."
        )
    if is_causal and not _is_close(begin, right[:, :length]):
        # Some models scale positions by the length of a row, so the comparison that decides keeps the length.
        changed = ids.clone()
        changed[:, length:] = placeholder
        with torch.no_grad():
            begin = states_of(stack(input_ids=changed, **options))[:, :length]
    if is_causal and not _is_close(begin, right[:, :length]):
        raise EntryUnsupportedError("its states depend on later tokens, so that it would see the answer it predicts.")
    long.largest.pop(stack.get_input_embeddings().weight, None)
    positions = learned_positions(short, long, TOKENS - SHORT)
    reasons = []
    for entry in (Entry(), Entry(True, placeholder)):
        reasons.append(_fault(entry, stack, embeds, right, {"ids": others, **options}))
        if reasons[-1] is None:
            return EntryTrial(entry, None if positions is None else positions + ids.shape[1] - 1)
    raise EntryUnsupportedError(reasons[1])


def _fault(entry: Entry, stack: Any, embeds: Tensor, right: Tensor, options: dict[str, Any]) -> str | None:
    """Why embeddings do not enter a model in one way; None if they do, and if they have a gradient.

    One row has the embeddings of tokens, the other one embeddings that no token has.
    """
    ids = options["ids"]
    options = {**options, "ids": ids if ids is None else ids.expand(2, -1)}
    leaf = torch.cat([embeds, embeds * 1.01]).detach().requires_grad_()
    try:
        with torch.enable_grad():
            ours = states_of(entry.run(stack, leaf, **options))
            if ours.shape[1:] != right.shape[1:] or not _is_close(ours[:1], right):
                return "it reads token ids elsewhere than in its embedding module, and soft tokens have none."
            torch.autograd.grad(ours.float().sum(), leaf)
    except FAILURES as error:
        return f"soft tokens cannot enter it, or get no gradient ({_first_line(error)})."
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
    """The states or logits that a module returns first."""
    return output[0]  # type: ignore[no-any-return]


def _is_close(ours: Tensor, right: Tensor) -> bool:
    limit = TOLERANCE.get(right.dtype, HALF) * right.abs().max()
    return bool(((ours - right).abs() <= limit).all()) or not bool(right.isfinite().all())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
