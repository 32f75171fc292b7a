"""Image classification with the texts of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, final

from torchmetrics import Metric

from lightning_softprompt.backbones.contrastive.pixels import load_pixel_codec
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Classes, Example, ImageExample
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.images.image_files import check_image, image_ref, read_image
from lightning_softprompt.data.images.image_rows import is_undivided, read_image_rows
from lightning_softprompt.data.images.pixel_batches import ImageCollate, ViewedRows
from lightning_softprompt.data.labels import ClassNumbers, GivenLabels, words_by_name
from lightning_softprompt.data.prepared import Split
from lightning_softprompt.data.readers.class_column import (
    DEFAULT_LABEL,
    ClassColumn,
    inverse_frequencies,
    sample_per_class,
)
from lightning_softprompt.data.readers.sources import Origin
from lightning_softprompt.data.sampling.bucketing import Order, ResumableLoader
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedSampler
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.evaluation.extended import UserMetrics

ClassesUsed = Literal["all", "base", "new"] | list[str]


@final
class ImageClassificationDataModule(SoftPromptDataModule):
    """Classifies images by their similarity to the texts of classes. The backbone is a CLIP or SigLIP model.

    Sources are those of every data module, whose rows name an image file or contain its bytes, and folders of images
    with a folder for each class, such as `train/dog/1.jpg` or `dog/1.jpg`.

    Args:
        template: Text of a class: `{target}` is its label word, `{soft}` marks soft tokens.
        image: Column of the image: a path, relative to the file of rows; bytes; in Python, also an array of the type
            uint8 or an image of Pillow.
        label: Column of the class, see `ClassificationDataModule`.
        labels: The classes in order, each with its label word or words, or a list of names that are their own label
            words (default: the sorted names in the training rows, also in `validate`, `test` and `predict`).
        classes_used: The classes that are used; rows of other classes are left out. `base` is the first half of the
            classes, rounded up, and `new` the rest; a list names classes.
        shots: Few-shot: sample N training rows per class (by `seed`).
        balanced: Sample training rows so that all classes are equally frequent.
        min_area: Training shows a random part of each image with at least this share of its area, resized; 1 shows the
            whole image.
        mirrors: Whether training mirrors half of the images at random.
        max_pixels: Maximum pixels of an image; larger ones are errors.
        image_memory: MiB of pixels of whole images that are kept in memory.
        extra_metrics: Further metrics, see `ClassificationDataModule`.
        common: Arguments of every data module.

    Raises:
        ValueError: If an option is out of range, or the template inserts columns.
    """

    can_augment: ClassVar[bool] = False

    def __init__(
        self,
        template: str = "{soft}{target}.",
        image: str = "image",
        label: str = DEFAULT_LABEL,
        labels: GivenLabels | None = None,
        classes_used: ClassesUsed = "all",
        shots: int | None = None,
        balanced: bool = False,
        min_area: float = 1.0,
        mirrors: bool = False,
        max_pixels: int = 50_000_000,
        image_memory: int = 512,
        extra_metrics: Metric | Evaluation | list[Metric | Evaluation] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(template=template, **common)
        if self.template.columns:
            raise ValueError(
                f"the template of ImageClassificationDataModule is the text of a class, without columns, got "
                f"{list(self.template.columns)}"
            )
        if shots is not None and shots < 1:
            raise ValueError(f"shots must be at least 1, got {shots}")
        if not 0 < min_area <= 1:
            raise ValueError(f"min_area must be above 0 and at most 1, got {min_area}")
        if max_pixels < 1 or image_memory < 0:
            raise ValueError(
                f"max_pixels must be at least 1 and image_memory at least 0, got {max_pixels}, {image_memory}"
            )
        self.image, self.shots, self.balanced = image, shots, balanced
        self.min_area, self.mirrors = min_area, mirrors
        self.max_pixels, self.image_memory = max_pixels, image_memory
        self.classes_used = classes_used
        self._labels = labels
        self._column = ClassColumn(label, (image,))
        self.user_metrics = UserMetrics.from_option(extra_metrics)
        self._row_source.reader = partial(read_image_rows, label=label)
        self._row_source.is_undivided = is_undivided

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The column of the image."""
        return (self.image,)

    @cached_property
    def codec(self) -> Codec:
        """The codec of the backbone.

        Raises:
            ValueError: If the backbone reads no images.
        """
        codec = super().codec
        if not codec.reads_images:
            raise ValueError(f"{self.spec.name} reads no images; use a backbone such as openai/clip-vit-base-patch16")
        return codec

    @cached_property
    def _all_words(self) -> dict[str, list[str]]:
        """The label words of all classes, also of those that are not used."""
        labels = self._column.infer_names(self.rows("train")) if self._labels is None else self._labels
        return words_by_name(labels, "labels")

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """The label words of the classes that are used."""
        words = {name: self._all_words[name] for name in self._names_used()}
        if len(words) < 2 or not all(words.values()):
            raise ValueError(f"classification requires at least two classes, each with a label word, got {words}")
        return words

    def _names_used(self) -> list[str]:
        names = list(self._all_words)
        half = (len(names) + 1) // 2
        if self.classes_used == "all":
            return names
        if self.classes_used == "base":
            return names[:half]
        if self.classes_used == "new":
            return names[half:]
        if unknown := sorted(set(self.classes_used) - set(names)):
            raise ValueError(f"classes_used names {unknown}, but the classes are {names}")
        return [name for name in names if name in self.classes_used]

    @property
    def classes(self) -> Classes:
        """The classes with their label words."""
        glue = self.template.glue
        words = {name: [glue + word for word in class_words] for name, class_words in self.words.items()}
        return Classes(words, self.template.text)

    @property
    def evaluation(self) -> Evaluation:
        """Accuracy, F1 and other classification metrics."""
        default = ClassificationEvaluation(tuple(self.words), self.user_metrics.metrics)
        return self.user_metrics.extend(default)

    @cached_property
    def _numbers(self) -> ClassNumbers:
        return ClassNumbers(list(self._all_words))

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row. Its label counts all classes, and its text has no target: an image has no text of its own."""
        if self.image not in row:
            raise ValueError(f"no column {self.image!r}; the row has {sorted(row)}: set data.image")
        ref = image_ref(row[self.image])
        check_image(ref, self.max_pixels)
        label = self._column.number(row, self._numbers) if labelled else None
        return ImageExample({}, "", label, image=ref)

    def convert_rows(self, name: Split) -> tuple[list[Example], list[Origin]]:
        """Converts the rows of a split, and leaves out those of classes that are not used."""
        examples, origins = super().convert_rows(name)
        positions = {self._numbers.find_name(used): position for position, used in enumerate(self.words)}
        kept_examples, kept_origins = [], []
        for example, origin in zip(examples, origins, strict=True):
            if example.label is None:
                kept_examples.append(example)
                kept_origins.append(origin)
            elif example.label in positions:
                kept_examples.append(replace(example, label=positions[example.label]))
                kept_origins.append(origin)
        return kept_examples, kept_origins

    def select_rows(self, examples: Sequence[Example]) -> Sequence[int]:
        """Returns all rows, or `shots` rows of each class."""
        if self.shots is None:
            return range(len(examples))
        return sample_per_class(examples, list(self.words), self.shots, "shots", self.seed)

    def weights(self, examples: Sequence[Example]) -> list[float] | None:
        """Returns the inverse frequency of each row's class if `balanced` is set."""
        return inverse_frequencies(examples) if self.balanced else None

    @cached_property
    def collate(self) -> ImageCollate:  # type: ignore[override]
        """Collates items of a split into a `Batch` with images."""
        pixels = load_pixel_codec(self.spec)
        return ImageCollate(self.codec, pixels, self.max_pixels, self.image_memory << 20)

    def build_loader(self, name: Split, order: Order) -> ResumableLoader:
        """Returns the loader of a split; training rows may show random parts of images."""
        if order != "shuffled" or (self.min_area == 1 and not self.mirrors):
            return super().build_loader(name, order)
        rows = ViewedRows(self.split(name), self.seed, self.min_area, self.mirrors)
        sampler = EpochIndexedSampler(self.sampler(name, order, self.ranks), len(rows))
        return ResumableLoader(rows, sampler, self.collate, num_workers=self.num_workers)

    def describe_row(self, name: Split, row: int) -> dict[str, Any]:
        """See `SoftPromptDataModule`. The input is the path or hash of the image, the target its class."""
        description = super().describe_row(name, row)
        example = self._image_example(name, row)
        label = example.label
        target = list(self.words)[label] if isinstance(label, int) else None
        return {**description, "input": example.image.path or example.image.digest, "target": target}

    def row_image(self, name: Split, row: int) -> Any:
        """Returns the image of a row, as an image of Pillow."""
        return read_image(self._image_example(name, row).image, self.max_pixels)

    def _image_example(self, name: Split, row: int) -> ImageExample:
        example = self.split(name).examples[row]
        assert isinstance(example, ImageExample)
        return example
