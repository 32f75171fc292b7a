"""Records of runs whose predictions are text; the prediction is the document with its words reversed."""

from typing import Any

import pytest
import torch
import wandb_file
from row_files import read_rows, write_rows

from lightning_softprompt.cli.app import main
from lightning_softprompt.core.types import Example
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.runs.run_spec import last_folder

DOCUMENTS = ("a warm and funny film", "dull", "is it a sad story ?", "a dog and a dog", "well", "bad film")


class BackwardsEvaluation(Evaluation):
    """Scores `overlap`, the share of the predicted words in the target, and `words`, but no text with a dog."""

    monitor = ("overlap", "max")
    ranking_score = "overlap"

    def __init__(self):
        super().__init__()
        self.reset()

    def predict(self, lm, batch):
        documents = [example.fields["document"].split() for example in batch.examples]
        return [{"prediction": " ".join(reversed(words)), "scores": None} for words in documents]

    def update(self, lm, batch):
        records = []
        for example, record in zip(batch.examples, self.predict(lm, batch), strict=True):
            words, target = record["prediction"].split(), example.target.split()
            overlap = sum(word in target for word in words) / len(words)
            self.overlaps.append(overlap)
            scores = {"overlap": overlap, "words": float(len(words))}
            records.append({**record, "target": example.target, "scores": scores if "dog" not in words else None})
        return records

    def compute(self):
        return {"overlap": torch.tensor(self.overlaps).mean()}

    def reset(self):
        self.overlaps = []


class BackwardsDataModule(SoftPromptDataModule):
    """Documents and summaries."""

    append_eos = True

    def __init__(self, template: str = "{soft}{document} :{target}", **common: Any) -> None:
        super().__init__(template=template, **common)

    def example(self, row, labelled):
        return Example(self.text(row), row["summary"] if labelled else "")

    @property
    def evaluation(self):
        return BackwardsEvaluation()


def make_rows(documents):
    return [{"document": text, "summary": f"{text.split()[0]} film"} for text in documents]


@pytest.fixture
def options(tmp_path, tiny_folder):
    write_rows(tmp_path / "rows.jsonl", make_rows(DOCUMENTS))
    splits = [f"--data.{split}={tmp_path / 'rows.jsonl'}" for split in ("train", "validation", "test", "predict")]
    return [
        f"--backbone.name={tiny_folder('llama')}",
        "--model=PromptTuning",
        "--model.length=2",
        "--data=BackwardsDataModule",
        *splits,
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run.folder={tmp_path / 'runs'}",
    ]


def test_a_test_writes_lines_with_all_scores_and_a_page_of_cases(options):
    assert main(["test", *options]) == 0
    lines = read_rows(last_folder() / "test_predictions.jsonl")
    assert [line["row"] for line in lines] == list(range(len(DOCUMENTS)))
    assert lines[0] == {
        "row": 0,
        "input": "a warm and funny film :",
        "prediction": "film funny and warm a",
        "scores": {"overlap": 0.4, "words": 5.0},
        "target": "a film",
    }
    assert lines[3]["scores"] is None
    page = (last_folder() / "test_cases.html").read_text()
    assert "by overlap" in page
    assert page.index("row 1: overlap 1, words 1") < page.index("row 0: overlap 0.4, words 5")
    assert "row 3:" not in page
    assert ">overlap</td>" in page


@pytest.mark.wandb
def test_the_table_of_a_validation_has_a_column_for_each_score(options):
    assert main(["fit", *options, "--trainer.max_steps=2", "--trainer.val_check_interval=2"]) == 0
    table = wandb_file.read_run(last_folder()).tables("val/predictions")[-1]
    assert table["columns"] == ["step", "row", "input", "target", "prediction", "correct", "overlap", "words"]
    assert table["data"][1] == [2, 1, "dull :", "dull film", "dull", False, 1.0, 1.0]
    assert table["data"][3][4:] == ["dog a and dog a", False, None, None]


def test_predictions_of_text_have_no_target(options):
    assert main(["predict", *options]) == 0
    lines = read_rows(last_folder() / "predictions.jsonl")
    assert lines[1] == {"row": 1, "input": "dull :", "prediction": "dull", "scores": None}


@pytest.mark.parametrize("empty", ["", " \n\t"], ids=["nothing", "spaces"])
def test_an_empty_document_is_an_error_with_its_line_or_is_skipped(options, tmp_path, capsys, caplog, empty):
    rows = make_rows(DOCUMENTS)
    path = write_rows(tmp_path / "empty.jsonl", [rows[0], {**rows[1], "document": empty}, rows[2]])
    command_options = [*options, f"--data.test={path}"]
    assert main(["test", *command_options]) == 2
    assert f"error: {path}:2: column 'document' is empty" in capsys.readouterr().err
    assert main(["test", *command_options, "--data.on_bad_row=skip"]) == 0
    assert any("1 of the test rows were skipped" in record.getMessage() for record in caplog.records)
    assert len((last_folder() / "test_predictions.jsonl").read_text().splitlines()) == 2


def test_of_several_columns_some_may_be_empty(options, tmp_path, capsys):
    path = write_rows(tmp_path / "two.jsonl", [{**make_rows(DOCUMENTS)[0], "hint": ""}])
    command_options = [*options, "--data.template={soft}{hint} {document} :{target}", f"--data.test={path}"]
    assert main(["test", *command_options]) == 0
    write_rows(path, [{"document": " ", "hint": "", "summary": "dull"}])
    assert main(["test", *command_options]) == 2
    assert "two.jsonl:1: column 'hint' is empty and column 'document' is empty" in capsys.readouterr().err
