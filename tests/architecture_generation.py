"""Checks of generation for every architecture; see `architecture_checks`.

The reference repeatedly takes the most likely token of a plain forward pass of one row: no batch and no cache.
`GENERATION` maps names to checks.
"""

import tiny
import torch
from architecture_checks import LONG, SHORT, DifferentError, check_of, close, refusable, soft_at

from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.conversation import Conversation
from lightning_softprompt.backbones.masked import MaskedBackbone
from lightning_softprompt.backbones.requirements import generates, require_of_copy
from lightning_softprompt.core.types import SoftPrompt

MAX_NEW_TOKENS = 5
MIN_LEAD = 1e-4  # lead of a token over the next one, relative to the logits, below which rounding decides
GENERATION = {}
check = check_of(GENERATION)
TEMPLATES = {"front": "{soft}{text} it was {target}", "middle": "the film {text}{soft} it was {target}"}


def questions(trial, texts, template):
    """Return a batch of rows without answers."""
    return tiny.batch_of(trial.backbone.codec, TEMPLATES[template], texts, [""] * len(texts))


@torch.no_grad()
def greedy(trial, row, tokens, ids=()):
    """Return the answer to a row and further tokens by plain forward passes, up to the first uncertain token."""
    answer = []
    while len(answer) < MAX_NEW_TOKENS and tiny.EOS not in answer:
        logits = next_logits(trial, row, tokens, [*ids, *answer])
        best = logits.topk(2).values
        if float(best[0] - best[1]) <= MIN_LEAD * float(logits.abs().max()):
            break
        answer.append(int(logits.argmax()))
    return answer


def next_logits(trial, row, tokens, answer):
    """Return the next logits [V] of the reference after a row and a part of its answer."""
    model, slot = trial.reference, row.slots[0]
    length = 0 if tokens is None else tokens.shape[1]
    ids = [*row.ids[:slot], *[tiny.UNK] * length, *row.ids[slot:]]
    with soft_at(model, slot, tokens):
        if not model.config.is_encoder_decoder:
            return model(input_ids=torch.tensor([[*ids, *answer]]), use_cache=False).logits[0, -1]
        opening = [*trial.backbone.opening, *answer]
        read = {"decoder_input_ids": torch.tensor([opening]), "use_cache": False}
        return model(input_ids=torch.tensor([ids]), **read).logits[0, -1]


def equal(what, ours, right):
    """Check that an answer has the beginning that is not decided by rounding.

    Raises:
        DifferentError: With both answers.
    """
    if ours[: len(right)] != right:
        raise DifferentError(f"{what} is {ours[: len(right)]}, not {right}")


@check
def generate(trial):
    """Greedy answers of batches equal the answers of single rows, with and without a prompt and a cache."""
    if isinstance(trial.backbone, MaskedBackbone):
        _check_filled_masks(trial)
        return
    with refusable(trial):
        require_of_copy((generates(),), "GenerationEvaluation", trial.backbone.spec)
    for texts in (SHORT, LONG):
        for template in TEMPLATES:
            for tokens in (trial.tokens, None):
                batch = questions(trial, texts, template)
                prompt = None if tokens is None else SoftPrompt(tokens=tokens)
                right = [greedy(trial, row, tokens) for row in trial.rows(batch)]
                for options in ({}, {"use_cache": False}):
                    options = {"max_new_tokens": MAX_NEW_TOKENS + 1, **options}
                    answers = trial.backbone.generate(batch, prompt, **options).tolist()
                    for b, (ours, answer) in enumerate(zip(answers, right, strict=True)):
                        equal(f"answer {b} {template} {options}", ours, answer)


def _check_filled_masks(trial):
    """Check that masks are filled with the most likely tokens."""
    for texts in (SHORT, LONG):
        batch = trial.batch(texts)
        filled = trial.backbone.generate(batch, SoftPrompt(tokens=trial.tokens))
        logits = trial.logits(batch, trial.tokens)
        best = logits.topk(2).values
        is_sure = best[:, 0] - best[:, 1] > MIN_LEAD * logits.abs().max()
        if not torch.equal(tiny.real(batch, filled)[is_sure], logits.argmax(-1)[is_sure]):
            raise DifferentError("filled masks differ")


@check
def beams(trial):
    """Beams are sorted by the likelihood that the forward pass gives them."""
    if isinstance(trial.backbone, MaskedBackbone):
        return
    (row,) = trial.rows(questions(trial, LONG[:1], "front"))
    batch = trial.backbone.codec.collate([row])
    lengths = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 3, "num_return_sequences": 3}
    lengths["forced_eos_token_id"] = None  # the likelihood of a forced token is not that of the model
    answers = trial.backbone.generate(batch, SoftPrompt(tokens=trial.tokens), **lengths).tolist()
    if len({tuple(answer) for answer in answers}) != len(answers):
        raise DifferentError("two beams are the same")
    scores = torch.tensor([_score(trial, row, answer) for answer in answers])
    close("order of beams", scores, scores.sort(descending=True).values, 1e-3)


@torch.no_grad()
def _score(trial, row, answer):
    steps = [next_logits(trial, row, trial.tokens, answer[:step]).log_softmax(-1) for step in range(len(answer))]
    return sum(float(step[token]) for step, token in zip(steps, answer, strict=True))


@check
def conversation(trial):
    """A second turn follows from the whole text."""
    if not isinstance(trial.backbone, CausalBackbone):
        return
    (row,) = trial.rows(questions(trial, SHORT[:1], "middle"))
    talk = Conversation(trial.backbone, trial.backbone.codec.collate([row]), SoftPrompt(tokens=trial.tokens))
    first = talk.answer(max_new_tokens=MAX_NEW_TOKENS)[0].tolist()
    equal("first answer", first, greedy(trial, row, trial.tokens))
    talk.add("dull dog")
    second = talk.answer(max_new_tokens=MAX_NEW_TOKENS)[0].tolist()
    equal("second answer", second, greedy(trial, row, trial.tokens, [*first, *trial.backbone.codec.ids("dull dog")]))
