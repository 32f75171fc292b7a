"""Streams an answer: its text in pieces, while its tokens are generated.

Transformers' `generate` returns only at the end, and the loop inside it is not public. It therefore runs in a second
thread, which pauses after each token until the caller asks for more text. The two threads never compute at the same
time, so results do not depend on their timing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from queue import SimpleQueue
from threading import Thread
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import StoppingCriteria

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"  # written without spaces
WORD_END = re.compile(rf"(?<!\s)(?=\s)|(?<=[{CJK}])")
INCOMPLETE = "\ufffd"  # how tokenizers decode a character whose last bytes are in later tokens

_streaming: WeakSet[Backbone] = WeakSet()  # backbones whose stream is neither exhausted nor closed


def refuse_open_stream(backbone: Backbone) -> None:
    """Refuses a backbone that is in the middle of a stream, when it contains the prompt of that stream.

    Raises:
        RuntimeError: If there is such a stream.
    """
    if backbone in _streaming:
        raise RuntimeError("the backbone is generating a stream; exhaust that iterator first, or call its close()")


def stream_answer(lm: PromptedLM, batch: Batch, decoding: Decoding) -> Iterator[str]:
    """Generates the answer of one row and yields it in pieces of whole words.

    Args:
        lm: The backbone with the prompt.
        batch: A batch of one row.
        decoding: How the answer is generated, without beams.

    Raises:
        ValueError: If a later token changes text that was already yielded.
    """
    backbone = lm.backbone
    refuse_open_stream(backbone)

    def generate(criterion: StoppingCriteria) -> Tensor:
        with torch.inference_mode():
            return lm.generate(batch, **decoding.options, stopping_criteria=[criterion])

    _streaming.add(backbone)
    steps = _PausedGeneration(generate, decoding)
    yielded = ""
    try:
        while not steps.is_finished:
            (text,) = decoding.texts(backbone.codec, steps.next_ids())
            if not steps.is_finished:
                text = complete_words(text, decoding.stop)
            common = min(len(text), len(yielded))
            if text[:common] != yielded[:common] or (steps.is_finished and common < len(yielded)):
                raise ValueError(f"later tokens changed the answer {yielded!r} to {text!r}; generate it without stream")
            if len(text) > len(yielded):
                piece, yielded = text[len(yielded) :], text
                yield piece
    finally:
        steps.close()
        _streaming.discard(backbone)


def complete_words(text: str, stop: Sequence[str] = ()) -> str:
    r"""Returns the part of an unfinished text that later tokens do not change: without its last word.

    A word is complete if a space follows it. Chinese and Japanese characters are complete by themselves.

    Args:
        text: The text of the tokens so far.
        stop: Texts that end an answer. The beginning of one at the end of the text is left out, too.

    >>> complete_words("The lamp is bro")
    'The lamp is'
    >>> complete_words("A lamp. Ques", stop=["Question:"])
    'A lamp.'
    """
    text = text.rstrip(INCOMPLETE)
    ends = [match.start() for match in WORD_END.finditer(text)]
    complete = text[: ends[-1]] if ends else ""
    starts = [len(text) - _overlap(text, one) for one in stop]
    return complete[: min(starts)].rstrip() if starts else complete


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text with which a stop text begins."""
    lengths = (length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length]))
    return next(lengths, 0)


class _PausedGeneration:
    """Runs a generation in a thread that pauses after each token.

    Args:
        generate: Returns the answer [1, U]; its argument is a stopping criterion of transformers' `generate`.
        decoding: The seed of sampling. The random state of the caller is the same before and after each token.

    Attributes:
        is_finished: Whether the complete answer was generated.
    """

    def __init__(self, generate: Callable[[StoppingCriteria], Tensor], decoding: Decoding) -> None:
        self.is_finished = False
        self._generate, self._decoding = generate, decoding
        self._events: SimpleQueue[Tensor | BaseException] = SimpleQueue()
        self._resume: SimpleQueue[bool] = SimpleQueue()  # True for one more token, False to stop
        self._thread: Thread | None = None
        self._random_state: dict[str, Any] | None = None

    def next_ids(self) -> Tensor:
        """Generates one more token and returns all ids [1, U] so far.

        Raises:
            Exception: As the generation raises it.
        """
        if not self._decoding.do_sample:
            return self._run_step()
        with torch.random.fork_rng():
            if self._random_state is None:
                torch.manual_seed(self._decoding.seed)
            else:
                _set_random_state(self._random_state)
            try:
                return self._run_step()
            finally:
                self._random_state = _random_state()

    def close(self) -> None:
        """Ends a generation that is not finished, and waits for its thread."""
        if self._thread is None:
            return
        if self._thread.is_alive():
            self._resume.put(False)
        self._thread.join()

    def _run_step(self) -> Tensor:
        if self._thread is None:
            threads = torch.get_num_threads()
            self._thread = Thread(target=copy_context().run, args=(self._run, threads), daemon=True)
            self._thread.start()
        else:
            self._resume.put(True)
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def _run(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # OpenMP counts them for each calling thread
        try:
            answer = self._generate(_PauseAfterToken(self._pause))
        except BaseException as error:  # the caller raises it
            self.is_finished = True
            self._events.put(error)
        else:
            self.is_finished = True
            self._events.put(answer)

    def _pause(self, ids: Tensor) -> bool:
        """Hands the ids [1, U] to the caller, and returns whether to stop."""
        self._events.put(ids)
        return not self._resume.get()


class _PauseAfterToken(StoppingCriteria):  # type: ignore[misc]
    """Pauses a generation after each token.

    Args:
        pause: Takes the ids [1, U] of the answer so far, and returns whether to stop.
    """

    def __init__(self, pause: Callable[[Tensor], bool]) -> None:
        self._pause = pause
        self._skip: int | None = None  # tokens before the answer

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """[1] bool, whether to stop."""
        if self._skip is None:
            self._skip = input_ids.shape[1] - 1
        should_stop = self._pause(input_ids[:, self._skip :].clone())
        return torch.tensor([should_stop], device=input_ids.device)


def _random_state() -> dict[str, Any]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])
