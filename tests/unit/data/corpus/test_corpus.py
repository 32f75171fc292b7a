"""`CorpusDataModule`: windows, held-out documents, errors, and runs from the command line."""

import json
import math

import pytest
from row_files import read_rows, write_rows
from runs import read_losses, read_metrics

from lightning_softprompt.__main__ import main
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.runs.run_spec import last_folder

DOCUMENTS = [
    "a warm and funny film about a dog that never ends well",
    "dull",
    "it is a sad story about a dog . this film is very good indeed !",
    "this story never was good , was it ?",
    "one good dog and one bad dog",
    "what a very long film , it never ends",
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    return path


@pytest.fixture
def options(tmp_path, tiny_folder, corpus):
    return [
        "--model=PromptTuning", "--model.length=2", f"--backbone.name={tiny_folder('llama')}",
        "--data=CorpusDataModule", f"--data.path={corpus}", "--data.window=24", "--data.batch_size=4",
        "--run.wandb=disabled",
        "--trainer.max_steps=3", "--trainer.accelerator=cpu", f"--run.folder={tmp_path / 'runs'}",
        "--trainer.enable_progress_bar=false", "--data.validation_share=0.2", "--data.test_share=0.2",
    ]  # fmt: skip


def windows_by_document(rows):
    documents = {}
    for example in rows.examples:
        documents.setdefault(example.document, []).append(example)
    return documents


def test_windows_cover_each_document_in_one_split(data_of, corpus):
    data = data_of(path=str(corpus))
    splits = [windows_by_document(data.split(name)) for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [4, 1, 1]
    merged = {document: windows for split in splits for document, windows in split.items()}
    joined = ["".join(window.target for window in merged[document]) for document in sorted(merged)]
    assert joined == DOCUMENTS
    other = data_of(path=str(corpus), seed=1)
    assert windows_by_document(other.split("test")).keys() != splits[2].keys()


def test_every_token_of_a_window_is_a_target_and_the_end_of_a_document_is_trained(data_of):
    data = data_of(train=[{"text": DOCUMENTS[0]}], validation=[{"text": DOCUMENTS[0]}])
    train, validation = data.split("train"), data.split("validation")
    stop = data.codec.stop
    for rows, end in ((train, stop), (validation, ())):
        ids = [row.targets for row in rows.encoded]
        assert sum(ids, ()) == (*data.codec.ids(DOCUMENTS[0]), *end)
        assert all(row.ids == (*data.codec.start, *row.targets) for row in rows.encoded)
        assert all(row.num_truncated == 0 for row in rows.encoded)


def test_strides_that_do_not_fit_are_refused(data_of):
    for options in ({"stride": 24}, {"stride": 8}, {"stride": 16, "template": "{soft} {target}"}):
        with pytest.raises(ValueError, match="stride"):
            data_of(**options)
    with pytest.raises(ValueError, match="stride requires a decoder"):
        data_of("bert", stride=16, train=[{"text": "dull"}]).evaluation  # noqa: B018 (a property)


def test_a_window_with_too_many_tokens_is_divided(data_of):
    text = ". " * 400
    data = data_of(train=[{"text": text}], validation=[{"text": "dull"}], window=700, max_tokens=20)
    rows = data.split("train")
    assert max(len(row.ids) for row in rows.encoded) <= 20
    assert "".join(example.target for example in rows.examples) == text.strip()
    assert sum(example.num_words for example in rows.examples) == 400
    assert sum(example.num_bytes for example in rows.examples) == len(text.strip())


def test_max_tokens_below_a_word_is_an_error(data_of):
    data = data_of(train=[{"text": "a a a a a a a a a a"}], max_tokens=3, validation=[{"text": "dull"}])
    with pytest.raises(DataError, match="increase max_tokens"):
        data.split("train")


def test_a_corpus_of_one_document_cannot_be_divided(data_of, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a warm film\n\n")
    with pytest.raises(ValueError, match=r"1 documents, too few.*set data.validation"):
        data_of(path=str(path)).split("train")


def test_rows_without_text_are_errors(data_of):
    with pytest.raises(DataError, match=r"no column 'text'; the row has \['body'\]: set data.column"):
        data_of(train=[{"body": "a"}], validation=[{"body": "a"}]).split("train")
    with pytest.raises(DataError, match="must be text, got 3"):
        data_of(train=[{"text": 3}], validation=[{"text": "a"}]).split("train")
    with pytest.raises(DataError, match="has no text in any of its 2 documents"):
        data_of(train=[{"text": ""}, {"text": " "}], validation=[{"text": "a"}]).split("train")
    data = data_of(train=[{"text": ""}, {"text": "dull"}, {}], validation=[{"text": "a"}], on_bad_row="skip")
    assert len(data.split("train")) == 1


def test_wrong_options_are_refused(data_of):
    with pytest.raises(ValueError, match=r"inserts no columns, got \['text'\]"):
        data_of(template="{soft}{text}{target}")
    with pytest.raises(ValueError, match="at least 16 bytes"):
        data_of(window=8)


def test_a_prompt_is_trained_and_tested(options, corpus, caplog):
    assert main(["fit", *options]) == 0
    assert "train: 4 documents" in caplog.text
    folder = last_folder()
    validation = read_metrics(folder)["val"]
    assert {"val/bits_per_byte", "val/perplexity", "val/word_perplexity"} <= validation.keys()
    assert main(["test", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}", f"--data.test={corpus}"]) == 0
    metrics = read_metrics(last_folder())["test"]
    records = read_rows(last_folder() / "test_predictions.jsonl")
    assert "".join(record["target"] for record in records) == "".join(DOCUMENTS)
    assert [record["row"] for record in records] == list(range(len(records)))
    nats, tokens = (sum(record[name] for record in records) for name in ("nats", "tokens"))
    assert metrics["test/cross_entropy"] == pytest.approx(nats / tokens, rel=1e-4)
    assert metrics["test/bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(len(document) for document in DOCUMENTS), rel=1e-4
    )
    assert metrics["test/documents"] == 6


def test_new_documents_are_scored(options, tmp_path):
    assert main(["fit", *options]) == 0
    ckpt = last_folder() / "prompt.safetensors"
    rows = write_rows(tmp_path / "new.jsonl", [{"text": "a warm film about a very good dog"}, {"text": "dull"}])
    out = tmp_path / "out.jsonl"
    assert main(["predict", f"--ckpt_path={ckpt}", f"--data.predict={rows}", f"--run.predictions={out}"]) == 0
    records = read_rows(out)
    assert [record["document"] for record in records] == [0, 0, 1]
    assert all(record["prediction"].endswith("bits per byte") for record in records)


def test_a_source_that_does_not_exist_is_named(options, capsys):
    assert main(["fit", *options, "--data.path=missing.txt"]) == 2
    assert "missing.txt does not exist" in capsys.readouterr().err


@pytest.fixture
def general(tmp_path):
    path = tmp_path / "general.txt"
    path.write_text("\n\n".join(["that label is one word", "the text was long and dull", "wonderful : a story"] * 3))
    return path


def test_further_corpora_are_scored_by_their_name(options, corpus, general):
    assert main(["fit", *options, f"--data.corpora={{general: {general}}}"]) == 0
    folder = last_folder()
    validation = read_metrics(folder)["val"]
    assert {"val/bits_per_byte", "val/general/bits_per_byte"} <= validation.keys()
    ckpt = folder / "checkpoints" / "best.ckpt"
    assert main(["test", f"--ckpt_path={ckpt}"]) == 0
    metrics = read_metrics(last_folder())["test"]
    records = read_rows(last_folder() / "test_predictions.jsonl")
    nats = sum(record["nats"] for record in records if record["corpus"] == "general")
    size = sum(record["bytes"] for record in records if record["corpus"] == "general")
    assert metrics["test/general/bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert metrics["test/general/bits_per_byte_low"] <= metrics["test/general/bits_per_byte"]
    alone = ["test", f"--ckpt_path={ckpt}", "--data.corpora=null"]
    assert main(alone) == 0
    assert read_metrics(last_folder())["test"]["test/bits_per_byte"] == pytest.approx(metrics["test/bits_per_byte"])


def test_training_replays_a_corpus_by_its_rate(data_of, corpus, general):
    data = data_of(path=str(corpus), corpora={"general": str(general)}, rates={"general": 0.5}, batch_size=2)
    loader, count = data.build_loader("train", "shuffled"), len(data.split("train").examples)
    batches = list(loader)
    corpora = [{example.corpus for example in batch.examples} for batch in batches]
    assert corpora.count({""}) == corpora.count({"general"}) == len(batches) / 2
    windows = [row for batch in batches for row in batch.row_ids if batch.examples[0].corpus == ""]
    assert len(windows) == len(set(windows)) == sum(example.corpus == "" for example in data.split("train").examples)
    assert count > len(windows)
    loader.batch_sampler.set_epoch(1)
    assert [batch.row_ids for batch in loader] != [batch.row_ids for batch in batches]


def test_training_continues_in_the_middle_of_mixed_corpora(data_of, corpus, general):
    data = data_of(path=str(corpus), corpora={"general": str(general)}, rates={"general": 0.3}, batch_size=1)
    loader = data.build_loader("train", "shuffled")
    expected = [batch.row_ids for batch in loader]
    loader = data.build_loader("train", "shuffled")
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state = loader.state_dict()
    resumed = data.build_loader("train", "shuffled")
    resumed.load_state_dict(state)
    assert [batch.row_ids for batch in resumed] == expected[4:]


def test_wrong_corpora_are_refused(data_of, general, corpus):
    with pytest.raises(ValueError, match=r"rates names \['other'\], but corpora are \['general'\]"):
        data_of(corpora={"general": str(general)}, rates={"other": 0.1})
    with pytest.raises(ValueError, match="sum is below 1"):
        data_of(corpora={"general": str(general)}, rates={"general": 1.0})
    with pytest.raises(ValueError, match="only letters"):
        data_of(corpora={"a/b": str(general)})
    with pytest.raises(DataError, match=r"corpus 'general': missing.txt does not exist"):
        data_of(path=str(corpus), corpora={"general": "missing.txt"}).split("test")


def test_tests_are_compared_window_by_window(options, corpus, general, capsys, tmp_path):
    corpora = f"--data.corpora={{general: {general}}}"
    assert main(["test", *options[2:], "--model=NoPrompt", corpora]) == 0
    before = last_folder()
    assert main(["fit", *options, corpora, "--model.lr=0.5"]) == 0
    assert main(["test", f"--ckpt_path={last_folder() / 'checkpoints' / 'best.ckpt'}"]) == 0
    after = last_folder()
    capsys.readouterr()
    assert main(["likelihood", str(before), str(after), "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)
    assert [change["corpus"] for change in changes] == ["main", "general"] * 2
    for name, prefix in (("main", ""), ("general", "general/")):
        one, other = (change for change in changes if change["corpus"] == name)
        values = [read_metrics(run)["test"][f"test/{prefix}bits_per_byte"] for run in (before, after)]
        assert [one["bits_per_byte"], other["bits_per_byte"]] == pytest.approx(values, rel=1e-6)
        assert other["change"] == pytest.approx(values[1] - values[0], abs=1e-6)
        assert other["low"] <= other["change"] <= other["high"]
    assert main(["likelihood", str(before), str(after)]) == 0
    assert f"{changes[2]['change']:+.4f}" in capsys.readouterr().out
    assert main(["test", *options[2:], "--model=NoPrompt", "--data.window=30"]) == 0
    assert main(["likelihood", str(before), str(last_folder())]) == 2
    assert "scored different windows" in capsys.readouterr().err
    assert main(["likelihood", str(tmp_path)]) == 2
    assert "has no test_predictions.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_training_on_corrupted_text_continues_exactly(family, options, tiny_folder, tmp_path):
    corruption = {
        "bert": ["--data.corruption=MaskTokens", "--data.corruption.whole_words=true"],
        "bart": ["--data.corruption=CorruptSpans", "--data.corruption.rate=0.3"],
    }[family]
    common = [
        *options, f"--backbone.name={tiny_folder(family)}", *corruption, "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null",
    ]  # fmt: skip
    assert main(["fit", *common, f"--run.folder={tmp_path / 'one'}", "--trainer.max_steps=8"]) == 0
    complete = last_folder()
    assert "val/cross_entropy" in read_metrics(complete)["val"]
    assert main(["fit", *common, f"--run.folder={tmp_path / 'two'}", "--trainer.max_steps=4"]) == 0
    ckpt = last_folder() / "checkpoints" / "last.ckpt"
    two = ["fit", *common, f"--run.folder={tmp_path / 'two'}", f"--ckpt_path={ckpt}", "--trainer.max_steps=8"]
    assert main(two) == 0
    assert read_losses(last_folder())[-4:] == read_losses(complete)[-4:]
    assert main(["test", f"--ckpt_path={last_folder() / 'checkpoints' / 'last.ckpt'}"]) == 0
    assert "test/cross_entropy_low" in read_metrics(last_folder())["test"]


def test_a_corruption_of_another_family_is_an_error_before_the_run(options, tmp_path, capsys):
    assert main(["fit", *options, "--data.corruption=CorruptSpans"]) == 2
    assert "corruption is CorruptSpans, which is for encoder-decoders" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
