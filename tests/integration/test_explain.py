"""`softprompt explain` repeats a test of questions without some of their passages."""

import json

import pytest
from row_files import read_rows, write_rows, write_splits

from lightning_softprompt.__main__ import main
from lightning_softprompt.runs.run_spec import last_folder

CORPUS = {
    "dog": "the dog is sad . it never ends",
    "story": "a story about a dog and a film",
    "film": "a warm and funny film",
    "well": "all is well that ends well",
}
QUESTIONS = [
    {"question": "is the dog sad", "answers": ["sad", "very sad"], "positive_ids": ["dog"]},
    {"question": "what film ?", "answers": ["warm", "funny"], "positive_ids": ["film"]},
    {"question": "what ends well ?", "answers": ["all"], "positive_ids": ["well"]},
]


@pytest.fixture
def options(tmp_path, tiny_folder):
    folder = write_splits(tmp_path / "data", train=QUESTIONS, validation=QUESTIONS, test=QUESTIONS)
    write_rows(folder / "corpus.jsonl", [{"id": name, "text": text} for name, text in CORPUS.items()])
    return [
        f"--backbone.name={tiny_folder('llama')}",
        "--data=RagQaDataModule",
        f"--data.path={folder}",
        f"--data.corpus={folder}",
        "--data.index_settings={encoder: null}",
        "--data.retriever=Retriever",
        f"--data.retriever.index={tmp_path / 'index'}",
        "--data.retriever.mode=lexical",
        "--data.template={passages}{soft}{question} : {target}",
        "--data.passages.template={text} ,",
        "--data.passages.count=2",
        "--data.max_tokens=36",
        "--data.max_target_tokens=3",
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--run.wandb=disabled",
        f"--run.folder={tmp_path / 'runs'}",
    ]


@pytest.fixture
def bare(options):
    """The folder of a test without a prompt."""
    assert main(["test", "--model=NoPrompt", *options]) == 0
    return last_folder()


@pytest.fixture
def trained(options):
    """The folder of a test of a trained prompt."""
    training = ["--model=PromptTuning", "--model.length=3", "--model.lr=0.5", "--trainer.max_steps=4"]
    assert main(["fit", *training, *options]) == 0
    checkpoint = last_folder() / "checkpoints" / "last.ckpt"
    assert main(["test", f"--ckpt_path={checkpoint}"]) == 0
    return last_folder()


def test_a_trained_prompt_is_compared_with_the_bare_model(bare, trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a row of the table is one line
    capsys.readouterr()
    assert main(["explain", str(trained), "--baseline", str(bare), "--trainer.accelerator=cpu"]) == 0
    shown = capsys.readouterr().out
    for text in ("use ", "leak ", "gradient_agreement", "difference [95 % interval]", "explain.html"):
        assert text in shown
    records = read_rows(trained / "explain.jsonl")
    predictions = read_rows(trained / "test_predictions.jsonl")
    assert [record["row"] for record in records] == [record["row"] for record in predictions] == [0, 1, 2]
    assert not (bare / "explain.jsonl").exists()
    for record, prediction in zip(records, predictions, strict=True):
        assert record["prediction"] == prediction["prediction"]
        assert record["documents"] == [passage["document"] for passage in prediction["passages"]]
        assert record["is_relevant"] == [name in prediction["gold"] for name in record["documents"]]
        right = record["answers"]["right"]
        assert right["text"] == prediction["target"]
        assert sum(right["shapley"]) == pytest.approx(right["log_p_all"] - right["log_p_none"], abs=1e-6)
        for condition in ("run", "reversed", "other question", "bare"):
            masses = record["attention"][condition].values()
            assert [sum(by_layer) for by_layer in zip(*masses, strict=True)] == pytest.approx([1, 1], abs=1e-5)
        assert record["attention"]["bare"]["soft tokens"] == [0, 0]
        assert min(record["attention"]["run"]["soft tokens"]) > 0
    report = json.loads((trained / "explain.json").read_text())
    assert report["rows"] == 3
    assert set(report["measures"]) == {"generated", "right"}
    difference = report["baseline"]["measures"]["right"]["gain"]
    assert difference["difference"] == pytest.approx(difference["this"] - difference["other"])
    assert difference["difference"] != 0
    page = (trained / "explain.html").read_text()
    assert page.count("<article>") == 3
    assert "without prompt" in page


def test_the_rows_of_an_explained_baseline_are_used_again(bare, trained, capsys):
    assert main(["explain", str(bare), "--row=1", "--no-attention", "--trainer.accelerator=cpu"]) == 0
    (record,) = read_rows(bare / "explain.jsonl")
    assert record["row"] == 1
    assert record["attention"] == {}
    record["answers"]["right"]["log_p_all"] += 100
    write_rows(bare / "explain.jsonl", [record])
    command = ["explain", str(trained), "--row=1", "--no-attention", "--trainer.accelerator=cpu"]
    assert main([*command, "--baseline", str(bare)]) == 0
    assert f"Using {bare / 'explain.jsonl'}" in capsys.readouterr().err
    gain = json.loads((trained / "explain.json").read_text())["baseline"]["measures"]["right"]["gain"]
    assert gain["other"] > 90
    record["prediction"] = "another"  # not that of the test, so the row is computed again
    write_rows(bare / "explain.jsonl", [record])
    assert main([*command, "--baseline", str(bare)]) == 0
    gain = json.loads((trained / "explain.json").read_text())["baseline"]["measures"]["right"]["gain"]
    assert gain["other"] < 90


def test_tests_that_cannot_be_repeated_are_refused(bare, options, tmp_path, capsys):
    def error_of(*arguments):
        capsys.readouterr()
        assert main(["explain", *map(str, arguments), "--trainer.accelerator=cpu"]) == 2
        return capsys.readouterr().err

    assert "does not exist" in error_of(tmp_path / "none")
    assert "--rows must be at least 1" in error_of(bare, "--rows=0")
    assert "has no row 9; its rows are 0 to 2" in error_of(bare, "--row=9")
    rows = read_rows(bare / "test_predictions.jsonl")
    changed = [{**row, "passages": row["passages"][::-1]} for row in rows]
    write_rows(bare / "test_predictions.jsonl", changed)
    assert "had other passages in the test" in error_of(bare)
    write_rows(bare / "test_predictions.jsonl", [{**row, "passages": []} for row in rows])
    assert "row 2 of" in error_of(bare, "--row=2")
    assert "has passages" in error_of(bare)
    write_rows(bare / "test_predictions.jsonl", rows)
    assert "is a test with ClassificationDataModule" in error_of(bare, "--config", _classification(options, tmp_path))


def _classification(options, tmp_path):
    """Writes the config of another task."""
    path = tmp_path / "other.yaml"
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [{"text": "a film", "label": "good"}, {"text": "a dog", "label": "bad"}])
    values = {
        "backbone": {"name": options[0].partition("=")[2]},
        "model": {"class_path": "NoPrompt"},
        "data": {
            "class_path": "ClassificationDataModule",
            "init_args": {"test": str(rows), "train": str(rows), "template": "{text} it is {target}"},
        },
    }
    path.write_text(json.dumps(values))
    return path
