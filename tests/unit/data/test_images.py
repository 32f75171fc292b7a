"""Rows with images: their sources, the draw of rows, pixels, and errors that name the image."""

import csv
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import ImageView
from lightning_softprompt.data.images.datamodule import ImageClassificationDataModule
from lightning_softprompt.data.images.pixel_batches import cut_out

NAMES = ("bad", "dog", "film", "sad", "story")


def pixels(number, shape=(10, 12, 3)):
    return np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def spec(tiny_folder):
    return BackboneSpec(str(tiny_folder("clip")))


@pytest.fixture
def rows():
    """Four rows of each class, as arrays."""
    return [{"image": pixels(n), "label": NAMES[n % 5]} for n in range(20)]


@pytest.fixture
def folder(tmp_path, rows):
    """The same images as files in folders of classes."""
    for number, row in enumerate(rows):
        path = tmp_path / "images" / row["label"] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row["image"]).save(path)
    return tmp_path / "images"


def data_of(spec, **arguments):
    arguments = {"validation_share": 0.25, "test_share": 0.0, **arguments}
    return ImageClassificationDataModule(backbone=spec, batch_size=8, cache=False, **arguments)


def first_batch(data, name="train"):
    split = data.split(name)
    return data.collate([split[row] for row in range(len(split))])


def test_pixels_are_those_of_the_image_processor(spec, rows):
    batch = first_batch(data_of(spec, train=rows, validation=rows))
    processor = AutoImageProcessor.from_pretrained(spec.name, backend="pil")
    expected = processor(images=[Image.fromarray(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]
    assert_close(batch.images, expected)
    assert batch.labels.tolist() == [NAMES.index(row["label"]) for row in rows]
    assert len(set(batch.image_keys)) == 20
    assert not batch.targets.numel()


def test_sources_give_the_same_rows(spec, rows, folder, tmp_path):
    expected = first_batch(data_of(spec, train=rows, validation=rows))
    paths = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    table = [{"image": str(path.relative_to(tmp_path)), "label": path.parent.name} for path in paths]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.DictWriter(file, ["image", "label"])
        writer.writeheader()
        writer.writerows(table)
    encoded = Dataset.from_list([{"image": str(path), "label": path.parent.name} for path in paths])
    encoded = encoded.cast_column("image", ImageFeature())
    pillow = [{"image": Image.fromarray(row["image"]), "label": row["label"]} for row in rows]
    contents = [{"image": path.read_bytes(), "label": path.parent.name} for path in paths]
    for source in (str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.csv"), encoded, pillow, contents):
        batch = first_batch(data_of(spec, train=source, validation=source))
        assert batch.image_keys == expected.image_keys
        assert torch.equal(batch.labels, expected.labels)


def test_a_folder_of_classes_is_divided_and_one_of_splits_is_not(spec, folder, tmp_path):
    divided = data_of(spec, path=str(folder), test_share=0.2)
    assert [len(divided.split(name)) for name in ("train", "validation", "test")] == [11, 5, 4]
    for name in ("train", "test"):
        (tmp_path / "splits" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "splits" / name).symlink_to(folder)
    splits = data_of(spec, path=str(tmp_path / "splits"))
    assert [len(splits.split(name)) for name in ("train", "validation", "test")] == [15, 5, 20]
    assert list(splits.words) == list(NAMES)


def test_base_and_new_classes(spec, rows):
    base = data_of(spec, train=rows, validation=rows, classes_used="base", shots=2)
    assert list(base.words) == ["bad", "dog", "film"]
    assert sorted(example.label for example in base.split("train").examples) == [0, 0, 1, 1, 2, 2]
    new = data_of(spec, train=rows, validation=rows, classes_used="new")
    assert list(new.classes.words) == ["sad", "story"]
    assert {example.label for example in new.split("validation").examples} == {0, 1}
    assert len(new.split("validation")) == 8
    listed = data_of(spec, train=rows, validation=rows, classes_used=["story", "dog"])
    assert list(listed.words) == ["dog", "story"]
    with pytest.raises(ValueError, match=r"classes_used names \['cat'\]"):
        _ = data_of(spec, train=rows, validation=rows, classes_used=["cat", "dog"]).words


def test_random_parts_are_a_function_of_seed_epoch_and_row(spec, rows):
    def epochs(seed):
        data = data_of(spec, train=rows, validation=rows, min_area=0.3, mirrors=True, seed=seed)
        loader = data.train_dataloader()
        batches = []
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)
            batches += list(loader)
        return {
            (n // 3, row): image for n, b in enumerate(batches) for row, image in zip(b.row_ids, b.images, strict=True)
        }

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[0, 3], first[1, 3])
    assert not torch.equal(first[0, 3], other[0, 3])


def test_a_part_of_an_image():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    part = cut_out(image, ImageView(area=0.25, ratio=1.0, left=1.0, top=0.0, is_mirrored=True), (2, 2))
    assert np.asarray(part).tolist() == [[3, 2], [7, 6]]


def broken_files(folder):
    content = (folder / "dog" / "01.png").read_bytes()
    return {
        "text.png": (b"not an image", "no image that Pillow can read"),
        "half.png": (content[: len(content) // 2], "broken or incomplete image"),
        "empty.jpg": (b"", "no image that Pillow can read"),
    }


def test_broken_images_are_errors_with_file_and_line(spec, folder, tmp_path):
    for name, (content, message) in broken_files(folder).items():
        (tmp_path / name).write_bytes(content)
        table = [{"image": "images/dog/01.png", "label": "dog"}, {"image": name, "label": "bad"}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        data = data_of(spec, train=str(tmp_path / "rows.jsonl"), validation=str(tmp_path / "rows.jsonl"))
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            first_batch(data)
        if name != "half.png":  # which is incomplete only after its header
            with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*"):
                data.split("train")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", "there is no image .*missing.png"),
        (pixels(0, (100, 101, 3)), r"101 x 100 pixels, more than data\.max_pixels=10,000"),
        (pixels(0).astype(np.float32), "uint8"),
        ("", "path of an image is empty"),
        (3, "must be a path, bytes"),
        ({"path": None, "bytes": None}, "requires the key 'bytes' or 'path'"),
    ],
)
def test_other_bad_images_are_errors_with_the_row(spec, rows, image, message):
    data = data_of(spec, train=[*rows, {"image": image, "label": "dog"}], validation=rows, max_pixels=10_000)
    with pytest.raises(ValueError, match=rf"row 20 of the given rows: .*{message}"):
        data.split("train")


def test_bad_rows_can_be_skipped(spec, rows, caplog):
    bad = [*rows, {"image": b"no image", "label": "dog"}]
    assert len(data_of(spec, train=bad, validation=rows, on_bad_row="skip").split("train")) == 20
    assert "1 of the train rows were skipped" in caplog.text


def test_a_huge_image_is_refused_before_it_is_decoded(spec, rows, tmp_path):
    size = 30_000
    Image.new("1", (size, size)).save(tmp_path / "huge.png")  # 900 million pixels in 100 kB
    data = data_of(spec, train=[*rows, {"image": str(tmp_path / "huge.png"), "label": "dog"}], validation=rows)
    with pytest.raises(ValueError, match=r"huge\.png is too large"):
        data.split("train")


def test_a_grey_or_transparent_image_becomes_rgb(spec, rows):
    grey, transparent = pixels(0, (9, 9)), pixels(0, (9, 9, 4))
    more = [*rows, {"image": grey, "label": "dog"}, {"image": transparent, "label": "dog"}]
    assert first_batch(data_of(spec, train=more, validation=rows)).images.shape == (22, 3, 8, 8)


def test_options_are_checked(spec, rows, tiny_folder):
    for options, message in (
        ({"template": "{soft}{text}{target}"}, "without columns"),
        ({"min_area": 0.0}, "min_area"),
        ({"shots": 0}, "shots"),
        ({"image_memory": -1}, "image_memory"),
    ):
        with pytest.raises(ValueError, match=message):
            data_of(spec, train=rows, **options)
    with pytest.raises(ValueError, match="reads no images"):
        _ = data_of(BackboneSpec(str(tiny_folder("llama"))), train=rows, validation=rows).split("train")


def test_rows_are_described_by_their_image(spec, folder):
    data = data_of(spec, path=str(folder))
    description = data.describe_row("train", 0)
    assert description["input"].endswith(".png")
    assert description["target"] in NAMES
    assert data.row_image("train", 0).size == (12, 10)


def test_predictions_need_no_labels(spec, rows):
    unlabelled = [{"image": row["image"]} for row in rows]
    data = data_of(spec, train=rows, validation=rows, predict=unlabelled)
    batch = first_batch(data, "predict")
    assert batch.labels is None
    assert data.describe_row("predict", 0)["target"] is None
