"""Splits in folders and on the Hub."""

import datasets
import pytest
from source_files import ROWS, texts_of, write, write_named_files

from lightning_softprompt.data.readers.sources import DataError, read_rows


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_the_validation_split_of_a_folder_can_have_any_usual_name(tmp_path, name):
    write(tmp_path / "train.jsonl", '{"text": "train"}')
    path = write(tmp_path / f"{name}.csv", "text\nval\n")
    assert list(read_rows(tmp_path, "validation")) == [{"text": "val"}]
    assert read_rows(tmp_path, "train").where(0) == f"{tmp_path / 'train.jsonl'}:1"
    assert read_rows(tmp_path, "validation").where(0) == f"{path}:2"


def test_a_split_of_a_folder_is_chosen_by_its_exact_name_or_rejected_if_ambiguous(tmp_path):
    write(tmp_path / "val.jsonl", '{"text": "val"}')
    assert len(read_rows(tmp_path)) == 1
    write(tmp_path / "validation.jsonl", '{"text": "validation"}')
    assert read_rows(tmp_path, "validation")[0]["text"] == "validation"
    assert read_rows(tmp_path, "val")[0]["text"] == "val"
    with pytest.raises(DataError, match=r"splits \['val', 'validation'\], expected 'test'"):
        read_rows(tmp_path, "test")
    with pytest.raises(DataError, match=r"expected a single one"):
        read_rows(tmp_path)
    write(tmp_path / "val.csv", "text\nval\n")
    with pytest.raises(DataError, match=r"\['val.csv', 'val.jsonl'\] for the same split"):
        read_rows(tmp_path, "val")


def test_datasets_saved_to_disk_are_read(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "dev": table.select([1])}).save_to_disk(tmp_path / "many")
    assert list(read_rows(tmp_path / "one", "train")) == ROWS
    rows = read_rows(tmp_path / "many", "validation")
    assert list(rows) == ROWS[1:]
    assert rows.where(0) == f"row 0 of {tmp_path / 'many'}[dev]"


def test_a_misspelt_folder_is_not_requested_from_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data" / "reviews").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data/review does not exist. Did you mean reviews\?"):
        read_rows("data/review", "train")


def test_a_hub_name_is_loaded_with_its_config(monkeypatch):
    table, requests = datasets.Dataset.from_list(ROWS), []

    def load_dataset(*names):
        requests.append(names)
        return datasets.DatasetDict({"train": table, "validation": table})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("nyu-mll/glue:sst2", "train")[1] == ROWS[1]
    assert read_rows("imdb", "val").where(1) == "row 1 of imdb[validation]"
    assert requests == [("nyu-mll/glue", "sst2"), ("imdb", None)]


def test_an_unreachable_hub_causes_one_clear_error(monkeypatch):

    def fail(*names):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"glue could not be loaded.*Couldn't reach the Hub.*check name and network"):
        read_rows("glue", "train")


@pytest.mark.parametrize("columns", [{}, {"text": [], "label": []}])
def test_a_saved_dataset_without_rows_is_rejected(tmp_path, columns):
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(tmp_path / "splits")
    for folder in ("one", "splits"):
        with pytest.raises(DataError, match=rf"{folder}.* has no rows"):
            read_rows(str(tmp_path / folder), "train")


LAYOUTS = {
    "shards": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
    "shards with a hash": ["train-00000-of-00001-0a1b2c3d4e5f6789.jsonl"],
    "in data": ["data/train-00000-of-00001.jsonl"],
    "not sharded in data": ["data/train.jsonl"],
    "a folder for the split": ["train/part-0.jsonl", "train/part-1.jsonl"],
    "shards in a folder for the split": ["train/0-00000-of-00002.jsonl", "train/0-00001-of-00002.jsonl"],
    "a folder for the split in data": ["data/train/a.jsonl"],
    "the folder of a configuration": ["plain_text/train-00000-of-00001.jsonl"],
    "compressed": ["train.jsonl.gz"],
    "capitals": ["Train.jsonl"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_can_have_the_layouts_of_the_hub(tmp_path, layout):
    test_files = [name.replace("rain", "est") for name in LAYOUTS[layout]]
    write_named_files(tmp_path, *LAYOUTS[layout], *test_files, "README.jsonl.md", ".cache/train.jsonl")
    assert texts_of(read_rows(tmp_path, "train")) == LAYOUTS[layout]
    with pytest.raises(DataError, match=r"has the splits \[.*\], expected 'validation'"):
        read_rows(tmp_path, "validation")


def test_files_of_sub_folders_are_not_splits_of_a_folder_with_files_of_splits(tmp_path):
    write_named_files(tmp_path, "train.jsonl", "old/validation.jsonl", "data/dev.jsonl")
    with pytest.raises(DataError, match=r"has the splits \['train'\], expected 'validation'"):
        read_rows(tmp_path, "validation")
    write_named_files(tmp_path, "validation/a.jsonl")
    assert texts_of(read_rows(tmp_path, "validation")) == ["validation/a.jsonl"]


def test_a_split_saved_by_datasets_is_not_read_as_json_files(tmp_path):
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "train"))
    write_named_files(tmp_path, "test/dataset_info.json", "test/part.jsonl")
    assert texts_of(read_rows(tmp_path, "train")) == ["a"]
    assert texts_of(read_rows(tmp_path, "test")) == ["test/part.jsonl"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train.xlsx", "notes.md"],
            r"no files of rows for the split 'train': it contains \['notes.md', 'train.xlsx'\]",
        ),
        ([".git/train.jsonl"], r"no files of rows for the split 'train': it is empty"),
        (["sst2_train-1.jsonl", "test.jsonl"], r"If \['sst2_train-1'\] are parts of it, pass their files"),
        (["constrain.jsonl", "test.jsonl"], r"expected 'train'. Name one of its splits"),
    ],
)
def test_a_folder_without_the_split_is_reported_with_its_content(tmp_path, names, message):
    write_named_files(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path, "train")


def test_a_split_with_a_missing_shard_is_rejected(tmp_path):
    write_named_files(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    with pytest.raises(DataError, match=r"one of 3 files, but number 1 of them is missing"):
        read_rows(tmp_path, "train")


def test_several_configurations_of_a_dataset_are_rejected(tmp_path):
    write_named_files(tmp_path, "cola/train-00000-of-00001.jsonl", "sst2/train-00000-of-00001.jsonl")
    with pytest.raises(DataError, match=r"has the split in the folders \['cola', 'sst2'\]. Name one of them"):
        read_rows(tmp_path, "train")
    assert len(read_rows(tmp_path / "sst2", "train")) == 1
