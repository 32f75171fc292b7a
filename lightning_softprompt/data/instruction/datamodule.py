"""`InstructionDataModule`: instruction tuning on single instructions and on dialogues of several turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, cast, final

from torchmetrics import Metric

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.tokenization.chat_template import find_difference, read_chat_format
from lightning_softprompt.constraints.example import ConstrainedDialogue
from lightning_softprompt.core.chat_format import TEMPLATE, ChatExample, ChatFormat, SoftPosition
from lightning_softprompt.core.chat_rows import ChatRows
from lightning_softprompt.core.types import Example
from lightning_softprompt.data.answer_texts import read_row_constraints
from lightning_softprompt.data.augmentation.base import RowText
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.instruction.row_encoder import ChatRowEncoder
from lightning_softprompt.data.instruction.turn_text import TurnText
from lightning_softprompt.data.prepared import Split
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.extended import UserMetrics
from lightning_softprompt.evaluation.instruction import InstructionEvaluation
from lightning_softprompt.evaluation.metrics.text import RougeWords

DEFAULT_METRICS = ("rougeL",)


@final
class InstructionDataModule(SoftPromptDataModule):
    r"""Trains a backbone to follow instructions, or to answer in dialogues.

    A row has the columns `instruction`, `input` (optional) and `output`, or a column `messages` with a list of
    `{role, content}`. Its text has the format of the tokenizer's chat template. The loss is computed on the answers,
    including the token that ends each of them. All answers of a dialogue are predicted in one pass.

        softprompt fit --model PromptTuning --data InstructionDataModule --data.path FOLDER

    A dialogue that is too long loses its oldest turns. If the last user turn alone is too long, the input is truncated,
    and then the instruction. An answer that is truncated does not end with EOS.

    Args:
        instruction: Column of the instruction.
        input: Column of the text that the instruction is about, which may be empty; `context` if rows lack `input`.
        output: Column of the answer, or of a list of answers, of which the first one is trained; `response` if rows
            lack `output`.
        messages: Column of the list of messages, of the roles system (optional, the first one), user and assistant.
        references: Optional column with lists of further answers that metrics accept.
        separator: Text between the instruction and the input.
        default_instruction: Instruction of rows without that column, such as `Summarize this text.`
        soft: Position of the soft tokens: before the first turn (`start`), in the system turn (`system`), or in the
            last user turn (`user`).
        system: System turn of dialogues that have none: a text, `true` for the default of the chat template, or
            `false` to omit it.
        chat_format: The texts around turns (default: those of the tokenizer's chat template; without one, `User: ...`
            and `Assistant: ...`). It replaces the template.
        loss_turns: The answers of a dialogue that have a loss: all of them, or the last one (default: `all` for
            decoders, and `last` for encoder-decoders, which do not support `all`).
        max_target_tokens: Tokens of max_tokens reserved for the last answer; longer answers are truncated.
        decoding: How answers are generated (default: greedy decoding).
        metrics: Metrics of generated answers: rouge1 to rouge9, rougeL, bertscore, bleu, chrf, nist.
        rouge_words: Words that ROUGE compares: `ascii` (a-z and digits, as in published results) or `unicode` (words of
            all scripts).
        generate_every: Validation generates answers every N epochs. Loss and perplexity are computed in every epoch.
        generate_rows: Maximum rows for which validation generates answers; null for all rows.
        generate_minutes: Maximum minutes that a validation spends on generation (default: no limit).
        extra_metrics: Further metrics: one or several metrics of torchmetrics, which are updated with predicted texts
            and references, or evaluations.
        constraints: Optional column with the verifiable constraints of a row, such as `[{"kind": "no_commas"}]`. Their
            metrics are the shares of constraints and of rows that answers meet. See `softprompt constraints`.
        common: Arguments of every data module.

    Raises:
        ValueError: If max_target_tokens is not between 0 and max_tokens, or a number is not above 0.
    """

    fixed_options = ("template", "truncate")
    append_eos = True

    def __init__(
        self,
        instruction: str = "instruction",
        input: str = "input",
        output: str = "output",
        messages: str = "messages",
        references: str = "references",
        separator: str = "\n\n",
        default_instruction: str = "",
        soft: SoftPosition = "start",
        system: bool | str = True,
        chat_format: ChatFormat | None = None,
        loss_turns: Literal["all", "last"] | None = None,
        max_target_tokens: int = 128,
        decoding: Decoding | None = None,
        metrics: Sequence[str] = DEFAULT_METRICS,
        rouge_words: RougeWords = "ascii",
        generate_every: int = 1,
        generate_rows: int | None = 16,
        generate_minutes: float | None = None,
        extra_metrics: Metric | Evaluation | list[Metric | Evaluation] | None = None,
        constraints: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(template=TEMPLATE, truncate=[], **common)
        self.reserve_target_tokens(max_target_tokens, decoding or Decoding())
        self._row_settings = {
            "instruction": instruction,
            "input": input,
            "output": output,
            "messages": messages,
            "references": references,
            "separator": separator,
            "default_instruction": default_instruction,
        }
        self.soft, self.system = soft, system
        self.given_format, self.loss_turns = chat_format, loss_turns
        self.constraints = constraints
        self._generation: dict[str, Any] = {
            "metrics": metrics,
            "rouge_words": rouge_words,
            "every": generate_every,
            "sample": generate_rows,
            "minutes": generate_minutes,
            "constraints": constraints is not None,
        }
        self.user_metrics = UserMetrics.from_option(extra_metrics)

    @cached_property
    def chat(self) -> ChatRows:
        """How rows become dialogues.

        Raises:
            ValueError: If the chat template of the tokenizer cannot be used.
        """
        tokenizer = self.codec.tokenizer
        chat = self.given_format or read_chat_format(tokenizer)
        if chat is None:
            self.log_once("The tokenizer has no chat template; turns begin with 'User: ' and 'Assistant: '")
            chat = ChatFormat()
        elif self.given_format is not None and tokenizer.chat_template:
            difference = find_difference(chat, tokenizer)
            if difference is not None:
                self.log_once(f"data.chat_format differs from the chat template of the tokenizer: {difference}")
        texts: dict[bool | str, str | None] = {True: chat.system, False: None}
        system = texts[self.system] if self.system in texts else str(self.system)
        return ChatRows(replace(chat, soft=self.soft, system=system), **self._row_settings)

    @property
    def learns_all(self) -> bool:
        """Whether all answers of a dialogue have a loss.

        Raises:
            ValueError: If the backbone does not support it.
        """
        is_decoder = self.codec.answer_location == "end"
        if self.loss_turns == "all" and not is_decoder:
            raise ValueError(f"loss_turns=all requires a decoder; {self.spec.name} is none, so set loss_turns to last")
        return is_decoder and self.loss_turns != "last"

    @property
    def evaluation(self) -> Evaluation:
        """Loss and perplexity of the answers, and metrics of generated answers."""
        default = InstructionEvaluation(self.decoding, extra_metrics=self.user_metrics.metrics, **self._generation)
        return self.user_metrics.extend(default)

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """How rows are written, with the format of dialogues."""
        return {"": replace(super().row_formats[""], chat=self.chat)}

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The column of the instruction, or of the input of a default one. Lines of plain text become this column."""
        return (self._row_settings["input" if self._row_settings["default_instruction"] else "instruction"],)

    @property
    def _encoder(self) -> ChatRowEncoder:
        encoder = super()._encoder
        return ChatRowEncoder(**vars(encoder), chat=self.chat.chat, learns_all=self.learns_all)

    @property
    def row_text(self) -> RowText:
        """How augmentations read and write the last user turn."""
        return TurnText(self._encoder, self.chat)

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row to a dialogue."""
        example = self.chat.example(row, labelled)
        if self.constraints is None or not labelled:
            return example
        return ConstrainedDialogue(**vars(example), constraints=read_row_constraints(row, self.constraints))

    def describe_row(self, name: Split, row: int) -> dict[str, Any]:
        """Describes a row. Its `input` is the text of the turns, without the texts around them."""
        turns = cast(ChatExample, self.split(name).examples[row]).turns
        lines = [f"{turn.role}: {turn.text}" for turn in turns]
        return {**super().describe_row(name, row), "input": "\n".join(lines) if len(turns) > 1 else turns[0].text}
