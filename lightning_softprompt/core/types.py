"""The data types of a run, and the letters that name the axes of their tensors.

Axis letters, used in every comment and docstring of the package::

    B batch    T input tokens    U target tokens    P soft tokens    S slots     H hidden
    V vocabulary    L layers     N key/value heads  D head size      C classes   K tasks
    W words

How data flows::

    row --data module--> Example --Template--> pieces --Codec.encode--> Encoded --Codec.collate--> Batch
                                                                                                     |
                                              method: prompt(batch) -> SoftPrompt <------------------+
                                                            |                                        |
                                              backbone: forward(batch, prompt) -> logits [B, U, V] <-+
                                                            |
                                              objective(lm, batch) -> loss    evaluation(lm, batch) -> metrics
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

IGNORE = -100  # a target without loss
NO_TOKEN = -1  # the position of a word that has no token in the row

Pairs = Mapping[int, tuple[Tensor, Tensor]]  # keys and values [B|1, N, P, D] each, by layer
KeysValues = Mapping[str, Pairs]  # by kind of attention
Spans = tuple[tuple[int, int], ...]  # start and end of stretches of a text
Extended = TypeVar("Extended", bound="Batch")
Label = int | tuple[int, ...]  # the class of a row, or of each of its words


@dataclass(frozen=True)
class ShownPassage:
    """A passage that a row contains.

    Args:
        document: The id of its document.
        text: Its text, as in the row.
        rank: Its rank among the retrieved passages, from 0; None if it was not retrieved.
    """

    document: str
    text: str
    rank: int | None = None


@dataclass(frozen=True)
class Example:
    """One row of a data set as text.

    Args:
        fields: The columns that the template can insert.
        target: The expected output; empty if it is unknown.
        label: The class of the row, or of each of its words; None if there are no classes or it is unknown.
        references: Texts that metrics accept as correct, in addition to the target.
        words: Spans of the words that have classes, by the field that contains them.
        passages: The passages that the row contains, in order.
        found: The documents that were retrieved for its question, the best first.
        gold: The documents that are known to contain the answer.
        searched: Number of passages that were requested from retrieval; 0 without retrieval.
        template_spans: Spans of each field that come from a template, such as the template of passages. Control tokens
            are recognized there; elsewhere in a field their spelling is text.
        ends_text: Whether the token that stops generation follows the target, in addition to the data module's rule.
    """

    fields: Mapping[str, str]
    target: str
    label: Label | None = None
    references: tuple[str, ...] = ()
    words: Mapping[str, Spans] = field(default_factory=dict)
    passages: tuple[ShownPassage, ...] = ()
    found: tuple[str, ...] = ()
    gold: tuple[str, ...] = ()
    searched: int = 0
    template_spans: Mapping[str, Spans] = field(default_factory=dict)
    ends_text: bool = field(default=False, repr=False)  # not in digests of rows, which contain the tokens


@dataclass(frozen=True)
class OptionExample(Example):
    """A row with texts of which one is correct or preferred. `label` is its index.

    Args:
        options: The texts.
    """

    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreferenceExample(Example):
    """A row with several answers to one question, which are compared. `target` is the best of them.

    Args:
        rejected: The other answers, the best first.
        grades: The grade of the target and of each other answer; the higher, the better. Empty if they are unknown.
        margin: By how much the target is better than the rejected answer; None if it is unknown.
    """

    rejected: tuple[str, ...] = ()
    grades: tuple[float, ...] = ()
    margin: float | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers, the target first."""
        return (self.target, *self.rejected)


@dataclass(frozen=True)
class WindowExample(Example):
    """A window of a document, for language modeling. `target` is its text.

    Args:
        document: Number of its document in the source.
        num_bytes: Length of the window in UTF-8.
        num_words: Words that begin in the window; a word is a stretch without white space.
        corpus: Name of its corpus; empty for the main corpus.
    """

    document: int = 0
    num_bytes: int = 0
    num_words: int = 0
    corpus: str = ""


@dataclass(frozen=True)
class ImageRef:
    """An image: a file, or the encoded bytes of one.

    Args:
        path: Path of the file; empty for bytes.
        digest: A hash of the bytes; empty for a file.
        data: The bytes; None for a file.
    """

    path: str = ""
    digest: str = ""
    data: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Names the image in messages."""
        return self.path or f"the image with the hash {self.digest}"


@dataclass(frozen=True)
class ImageView:
    """Which part of an image is shown.

    Args:
        area: Its share of the area of the image.
        ratio: Its width over its height; None for the whole image.
        left: Its position, from 0 at the left end of the image to 1 at the right end.
        top: Its position, from 0 at the top to 1 at the bottom.
        is_mirrored: Whether left and right are exchanged.
    """

    area: float = 1.0
    ratio: float | None = None
    left: float = 0.0
    top: float = 0.0
    is_mirrored: bool = False


@dataclass(frozen=True)
class ImageExample(Example):
    """A row with an image.

    Args:
        image: The image.
        view: The part of it that is shown; None for the whole image.
    """

    image: ImageRef = field(default_factory=ImageRef)
    view: ImageView | None = None


@dataclass(frozen=True)
class Text:
    """A stretch of text.

    Args:
        text: The text.
        truncatable: Whether tokens of it are removed when the row is too long.
        words: Spans of its words, if they have classes. Only one text of a row has such words.
        template_spans: Spans that come from a template. Control tokens such as `<|im_end|>` are recognized there;
            elsewhere their spelling is text.
    """

    text: str
    truncatable: bool = False
    words: Spans = ()
    template_spans: Spans = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Slot:
    """A position for a soft block."""


@dataclass(frozen=True)
class Answer:
    """The position of the target.

    Args:
        glue: Spaces before it. They belong to the target, since words of most vocabularies begin with a space.
        closing: Control tokens that end it in place of the tokenizer's EOS, as text; empty for EOS.
    """

    glue: str = ""
    closing: str = ""


@dataclass(frozen=True)
class PastAnswer:
    """An answer of an earlier turn of a dialogue. Like the target, it is tokenized apart from the text around it.

    Args:
        text: The answer, with the spaces before it.
        closing: Control tokens that end it in place of the tokenizer's EOS, as text; empty for EOS.
        has_loss: Whether its tokens are predicted, including those that end it. Only decoders support this.
    """

    text: str
    closing: str = ""
    has_loss: bool = False


Piece = Text | Slot | Answer | PastAnswer


class Encoded(NamedTuple):
    """One row as tokens, in the format of a family.

    It is a tuple, so that batches of rows are cheap to send between processes and Lightning can traverse them.

    Args:
        ids: Input tokens, including the answer or its mask tokens.
        answers: Positions of the answer in `ids`. No method may read them.
        targets: The tokens to predict.
        slots: Soft block s is inserted before token `slots[s]` of `ids`; `len(ids)` is the end.
        words: Position of the first token of each word that has a class; `NO_TOKEN` if the word has no token.
        num_truncated: Number of tokens of text that were truncated.
        second_start: Position in `ids` of the second text of a pair, which encoders with two token types distinguish;
            `NO_TOKEN` in other rows.
    """

    ids: tuple[int, ...]
    answers: tuple[int, ...]
    targets: tuple[int, ...]
    slots: tuple[int, ...]
    words: tuple[int, ...] = ()
    num_truncated: int = 0
    second_start: int = NO_TOKEN


@dataclass(frozen=True)
class Classes:
    """The classes of a task, with their label words.

    Args:
        words: The label words of each class, in order, with the space that the template puts before them; empty for
            classes without label words, such as tags.
        template: The template of the rows. Calibration fills it without content.
        demonstrations: Training rows for methods that use demonstrations: the columns of the template, and the answer
            as `target`.
    """

    words: Mapping[str, Sequence[str]]
    template: str = "{soft}{text}{target}"
    demonstrations: Sequence[Mapping[str, str]] = ()

    def __len__(self) -> int:
        return len(self.words)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, in order."""
        return tuple(self.words)


@dataclass
class Batch:
    """Padded rows, the input of a backbone. `len()` is B.

    Args:
        input_ids: [B, T].
        mask: [B, T] bool, False on padding, which is on either side.
        source: [B, T] bool, True on tokens that a method may read: no padding and no answer. Methods get a batch in
            which it also excludes all that follows the first answer, see `Backbone.prompt_view`.
        targets: [B, U], `IGNORE` where there is no loss.
        slots: [B, S]; soft block s is inserted before token `slots[b, s]`.
        labels: The classes [B] of rows, or [B, W] of their words; `IGNORE` for rows without a class and for words that
            are not scored. None if no row has classes.
        task_ids: [B] or None.
        encoded: The rows as tokens, from which the tensors were collated. `Codec.collate` sets it; set it to the new
            rows if you replace `input_ids`, `mask`, `source`, `targets` or `slots`.
        examples: The rows as text, or None; evaluations compare answers with them.
        words: [B, W] or None; word w begins with token `words[b, w]`, or is `NO_TOKEN`; `IGNORE` beyond the last word.
        row_ids: Index of each row in its split, within its task (default: its position in the batch).
        global_row_ids: Index of each row in its split over all tasks (default: `row_ids`).
        groups: The question [B] that each row answers, if several rows answer the same question; rows of a question are
            adjacent. None if each row has a question of its own.
        grades: The grade [B] of each answer, the higher the better: 1 and 0 for a preferred and a rejected answer, the
            negative rank in a ranking. None if the answers have no grades.
        margins: By how much [B] each answer is better than the others of its question, for preferred answers; 0 for
            others. None if margins are unknown.
        images: The pixels [B, 3, h, w] of the image of each row, as the image processor of the backbone computes them;
            None for rows without images.
        image_keys: A hash of the pixels of each image, under which its features are cached; empty if images are not
            cached, such as randomly cropped ones.
        class_ids: The class [B] that each row describes, for the texts of classes that images are compared with; None
            for other rows.
        image_features: Features [B, F] of the image that each row is compared with, for the texts of classes and
            methods whose prompt depends on the image; None for other rows.
    """

    input_ids: Tensor
    mask: Tensor
    source: Tensor
    targets: Tensor
    slots: Tensor
    labels: Tensor | None = None
    task_ids: Tensor | None = None
    encoded: tuple[Encoded, ...] | None = None
    examples: tuple[Example, ...] | None = None
    words: Tensor | None = None
    row_ids: tuple[int, ...] = ()
    global_row_ids: tuple[int, ...] = ()
    groups: Tensor | None = None
    grades: Tensor | None = None
    margins: Tensor | None = None
    images: Tensor | None = None
    image_keys: tuple[str, ...] = ()
    class_ids: Tensor | None = None
    image_features: Tensor | None = None

    def __post_init__(self) -> None:
        self.row_ids = self.row_ids or tuple(range(len(self)))
        self.global_row_ids = self.global_row_ids or self.row_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def require_encoded(self) -> tuple[Encoded, ...]:
        """Returns the rows as tokens.

        Raises:
            ValueError: If the batch was not created by `Codec.collate`.
        """
        if self.encoded is None:
            raise ValueError("the batch does not contain its encoded rows; create it with `Codec.collate`")
        return self.encoded

    def by_task(self) -> list[tuple[int, list[int], Batch]]:
        """Returns the task id, the positions in the batch and the rows of each task that occurs.

        Without task ids all rows are of task 0. The rows of a single task are the batch itself.
        """
        tasks = [0] * len(self) if self.task_ids is None else self.task_ids.tolist()
        positions: dict[int, list[int]] = {}
        for position, task in enumerate(tasks):
            positions.setdefault(task, []).append(position)
        if len(positions) < 2:
            return [(task, task_positions, self) for task, task_positions in positions.items()]
        return [(task, task_positions, self.only(task_positions)) for task, task_positions in sorted(positions.items())]

    def units(self) -> list[list[int]]:
        """Returns the positions of the rows that must stay together: those of each question, or single rows.

        Raises:
            ValueError: If rows of a question are not adjacent.
        """
        if self.groups is None:
            return [[b] for b in range(len(self))]
        units: dict[int, list[int]] = {}
        for b, group in enumerate(self.groups.tolist()):
            units.setdefault(group, []).append(b)
        for group, unit in units.items():
            if unit[-1] - unit[0] >= len(unit):
                raise ValueError(f"the rows of question {group} are not adjacent in the batch, but at {unit}")
        return list(units.values())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Returns a copy with every tensor changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Returns the same rows on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def extend(self, kind: type[Extended], **values: Any) -> Extended:
        """Returns the same rows as a subclass of `Batch` with further tensors, whose first axis is B."""
        own = {field.name: getattr(self, field.name) for field in fields(Batch)}
        return kind(**own, **values)

    def only(self, positions: Sequence[int]) -> Self:
        """Returns the rows at some positions, padded to the width of the whole batch."""
        part = self._map(lambda tensor: tensor[list(positions)])
        part.row_ids = tuple(self.row_ids[b] for b in positions)
        part.global_row_ids = tuple(self.global_row_ids[b] for b in positions)
        part.image_keys = tuple(self.image_keys[b] for b in positions) if self.image_keys else ()
        if self.encoded is not None:
            part.encoded = tuple(self.encoded[b] for b in positions)
        if self.examples is not None:
            part.examples = tuple(self.examples[b] for b in positions)
        if part.words is not None and bool((part.words == IGNORE).all()):  # only the other rows have words
            part.words = None
            part.labels = None if part.labels is None else part.labels[:, 0]
        if part.labels is not None and bool((part.labels == IGNORE).all()):  # only the other rows have classes
            part.labels = None
        return part

    def pin_memory(self) -> Self:
        """Returns the same rows in page-locked memory, from which copies to a GPU are faster."""
        return self._map(Tensor.pin_memory)


def windows_of(batch: Batch) -> list[WindowExample]:
    """Returns the windows of a batch as text.

    Raises:
        ValueError: If the rows are not windows of documents.
    """
    windows = [example for example in batch.examples or () if isinstance(example, WindowExample)]
    if len(windows) < len(batch):
        raise ValueError("rows must be windows of documents, as CorpusDataModule reads them")
    return windows


def options_of(batch: Batch) -> list[tuple[str, ...]]:
    """Returns the options of each row of a batch.

    Raises:
        ValueError: If the rows have none.
    """
    examples = batch.examples or ()
    options = [example.options for example in examples if isinstance(example, OptionExample)]
    if len(options) < len(batch):
        raise ValueError("rows require options, as MultipleChoiceDataModule reads them")
    return options


@dataclass(frozen=True)
class SoftPrompt:
    """The trained values that a method adds to the frozen backbone for one batch.

    A leading axis of 1 means the same values for every row.

    Args:
        tokens: [B|1, P, H] soft tokens, inserted at the slots of the batch.
        blocks: The number of soft tokens at each slot, P in total; None inserts all at the first slot.
        token_mask: [B, P] bool, False on soft tokens that a row does not have; None if each row has all of them.
        shift: [B|1, T, H] added to the embeddings of the input tokens.
        kv: Keys and values to which every token can attend, by kind of attention (`self`, or `encoder`, `decoder` and
            `cross`) and layer: two tensors [B|1, N, P, D], as after the rotation of positions.
        kv_mask: [B, P] bool by kind of attention, False on keys that a row does not have. Kinds without a mask have all
            keys in each row.
        hidden: [B|1, P, H] by layer: soft tokens that are inserted before a layer and do not exist below it.
        deep: [B|1, P, H] by layer: states that replace those of the soft tokens before a layer, which later layers
            process. Only backbones that compare images with texts support it.
        image: The prompt of the image tower, whose soft tokens follow the patches; None leaves the tower unchanged.
        depends_on_image: Whether the prompt of a text depends on the image that the text is compared with. Each text
            then runs once per image.
        penalties: Scalars that the run can weight and add to the loss.
        logs: Scalars to log.

    Raises:
        ValueError: If the blocks do not add up to P.
    """

    tokens: Tensor | None = None
    blocks: tuple[int, ...] | None = None
    token_mask: Tensor | None = None
    shift: Tensor | None = None
    kv: KeysValues = field(default_factory=dict)
    kv_mask: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    deep: Mapping[int, Tensor] = field(default_factory=dict)
    image: SoftPrompt | None = None
    depends_on_image: bool = False
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    logs: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        length = 0 if self.tokens is None else self.tokens.shape[1]
        if self.blocks is not None and sum(self.blocks) != length:
            raise ValueError(f"blocks must add up to the {length} soft tokens, got {self.blocks}")

    def only(self, rows: Sequence[int]) -> SoftPrompt:
        """Returns the prompt of some rows of the batch."""

        def select(tensor: Tensor) -> Tensor:
            return tensor if len(tensor) == 1 else tensor[list(rows)]

        kv: dict[str, Pairs] = {}
        for kind, layers in self.kv.items():
            kv[kind] = {layer: (select(keys), select(values)) for layer, (keys, values) in layers.items()}
        return replace(
            self,
            tokens=None if self.tokens is None else select(self.tokens),
            token_mask=None if self.token_mask is None else select(self.token_mask),
            shift=None if self.shift is None else select(self.shift),
            kv=kv,
            kv_mask={kind: select(mask) for kind, mask in self.kv_mask.items()},
            hidden={layer: select(tokens) for layer, tokens in self.hidden.items()},
            deep={layer: select(tokens) for layer, tokens in self.deep.items()},
            image=None if self.image is None else self.image.only(rows),
        )
