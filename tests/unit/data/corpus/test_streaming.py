"""Corpora on disk: the same windows as in memory, and a training that continues exactly."""

import gzip
import json
import pickle

import pytest
from row_files import write_rows
from runs import read_losses, read_metrics

from lightning_softprompt.cli.app import main
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.data.sampling.holding_out import divide_many, divide_rows
from lightning_softprompt.runs.run_spec import last_folder

WORDS = "a warm and funny film about a dog that never ends well . it is very good indeed".split()  # noqa: SIM905
DOCUMENTS = []
for number in range(40):
    words = WORDS[number % 5 : 5 + number % 13]
    DOCUMENTS.append(" ".join(words * (1 + number % 4)))


@pytest.fixture
def sources(tmp_path):
    """The same documents in several forms."""
    (tmp_path / "corpus.txt").write_text("\n\n".join(DOCUMENTS))
    with gzip.open(tmp_path / "zipped.txt.gz", "wt") as file:
        file.write("\n\n".join(DOCUMENTS))
    write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in DOCUMENTS])
    (tmp_path / "corpus.json").write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / "folder" / f"{number:02d}.txt").write_text(text)
    names = ("corpus.txt", "zipped.txt.gz", "corpus.jsonl", "corpus.json", "folder")
    return {name: str(tmp_path / name) for name in names}


@pytest.mark.parametrize("name", ["corpus.txt", "zipped.txt.gz", "corpus.jsonl", "corpus.json", "folder"])
def test_windows_on_disk_equal_those_in_memory(data_of, sources, name):
    eager, lazy = data_of(path=sources[name]), data_of(path=sources[name], stream=True)
    for split in ("train", "validation", "test"):
        expected, rows = eager.split(split), lazy.split(split)
        assert list(rows.examples) == list(expected.examples)
        assert list(rows.encoded) == list(expected.encoded)
        assert list(rows.origins) == list(expected.origins)
        assert list(rows.lengths) == [example.num_bytes for example in expected.examples]


def test_contexts_on_disk_equal_those_in_memory(data_of, tmp_path):
    text = "".join(chr(0x4E00 + number) for number in range(40))  # no white space
    (tmp_path / "corpus.txt").write_text("\n\n".join([*DOCUMENTS, text, text]))
    eager, lazy = (data_of(path=str(tmp_path / "corpus.txt"), stride=16, stream=stream) for stream in (False, True))
    for split in ("train", "validation", "test"):
        expected, rows = eager.split(split), lazy.split(split)
        assert list(rows.examples) == list(expected.examples)
        assert list(rows.encoded) == list(expected.encoded)
        assert any(example.fields["context"] for example in rows.examples) == (split != "train")


def test_folders_with_splits_are_stored_by_split(data_of, tmp_path):
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"text": f"{split} {text}"} for text in DOCUMENTS])
    data = data_of(path=str(tmp_path), stream=True)
    for split in ("train", "validation", "test"):
        assert data.split(split).examples[0].target.startswith(split)
    assert len({example.document for example in data.split("train").examples}) == len(DOCUMENTS)


def test_workers_read_the_windows(data_of, sources):
    data = data_of(path=sources["corpus.txt"], stream=True)
    rows = pickle.loads(pickle.dumps(data.split("train")))
    assert list(rows.encoded) == list(data.split("train").encoded)


def test_a_changed_file_is_copied_again(data_of, sources, tmp_path):
    before = data_of(path=sources["corpus.txt"], stream=True).rows_digest("train")
    assert data_of(path=sources["corpus.txt"], stream=True).rows_digest("train") == before
    (tmp_path / "corpus.txt").write_text("\n\n".join([*DOCUMENTS[:-1], "dull"]))
    data = data_of(path=sources["corpus.txt"], stream=True)
    assert "dull" in {row.target for split in ("train", "validation", "test") for row in data.split(split).examples}
    assert data.rows_digest("train") != before


def test_windows_with_too_many_tokens(data_of, tmp_path):
    (tmp_path / "train.txt").write_text("a " * 40)
    (tmp_path / "validation.txt").write_text("\n\n" + "a " * 40)
    data = data_of(path=str(tmp_path), stream=True, window=60, max_tokens=20)
    assert max(len(row.ids) for row in data.split("train").encoded) <= 20
    assert data.split("train").encoded[0].num_truncated == 12
    with pytest.raises(DataError, match=r"validation.txt: a window has 30 tokens.*decrease data.window"):
        list(data.split("validation").encoded)


def test_errors_name_the_document(data_of, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"body": "b"}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: no column 'text'"):
        data_of(path=str(path), stream=True).split("train")
    (tmp_path / "bad.txt").write_bytes(b"good\n\nna\xefve\n\nfilm\n\ndog\n\nsad")
    with pytest.raises(DataError, match=r"bad.txt:3: not UTF-8"):
        data_of(path=str(tmp_path / "bad.txt"), stream=True).split("train")
    assert len(data_of(path=str(tmp_path / "bad.txt"), stream=True, on_bad_row="skip").split("train")) == 2
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty.txt has no rows"):
        data_of(path=str(tmp_path / "empty.txt"), stream=True).split("train")
    with pytest.raises(DataError, match="requires files or a folder"):
        data_of(train=[{"text": "a"}], validation=[{"text": "a"}], stream=True).split("train")


def test_options_that_exclude_streaming(data_of, sources):
    with pytest.raises(ValueError, match="set batch_size instead of batch_tokens"):
        data_of(path=sources["corpus.txt"], stream=True, batch_tokens=100)
    with pytest.raises(ValueError, match="set column instead of rename_columns"):
        data_of(path=sources["corpus.txt"], stream=True, rename_columns={"body": "text"})


@pytest.mark.parametrize(("count", "shares"), [(40, {"test": 0.1, "validation": 0.1}), (7, {"validation": 0.3})])
def test_documents_are_held_out_as_rows_are(count, shares):
    for seed in range(5):
        expected = divide_rows([None] * count, shares, seed)
        assert {name: rows.tolist() for name, rows in divide_many(count, shares, seed).items()} == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_continues_in_the_middle_of_a_corpus(tiny_folder, sources, tmp_path, workers):
    options = [
        "--model=PromptTuning", "--model.length=2", f"--backbone.name={tiny_folder('llama')}",
        "--data=CorpusDataModule", f"--data.path={sources['corpus.jsonl']}", "--data.window=24",
        "--data.batch_size=3", "--data.stream=true", f"--data.corpora={{general: {sources['folder']}}}",
        "--data.rates={general: 0.25}", f"--data.num_workers={workers}", "--run.wandb=disabled",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
        "--trainer.max_steps=9", "--trainer.val_check_interval=3",
    ]  # fmt: skip
    assert main(["fit", *options, f"--run.folder={tmp_path / 'one'}"]) == 0
    complete = last_folder()
    expected = read_losses(complete)
    assert main(["fit", *options, f"--run.folder={tmp_path / 'two'}", "--trainer.max_steps=6"]) == 0
    stopped = last_folder()
    ckpt = f"--ckpt_path={stopped / 'checkpoints' / 'last.ckpt'}"
    assert main(["fit", *options, f"--run.folder={tmp_path / 'two'}", ckpt]) == 0
    resumed = last_folder()
    assert read_losses(resumed)[-3:] == expected[-3:]
    assert read_metrics(resumed)["val"] == read_metrics(complete)["val"]
