"""`softprompt analyze` reads the records that `softprompt test` writes."""

import json
from typing import Any

import pytest
from row_files import read_rows, write_rows
from runs import read_metrics
from wandb_file import read_runs

from lightning_softprompt.__main__ import main
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.types import Example, ShownPassage
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.evaluation.qa import QaEvaluation
from lightning_softprompt.runs.run_spec import last_folder

ROWS = [
    {"question": "what is a funny dog ?", "answers": ["good", "very good"], "gold": ["b"]},
    {"question": "who is sad ?", "answers": ["a dog"], "gold": ["a", "z"]},
    {"question": "is it dull ?", "answers": [], "gold": []},
]
TEXTS = {"a": "a dog is sad", "b": "a funny dog is very good"}


class AsksDataModule(SoftPromptDataModule):
    """Questions, each with the same two passages."""

    append_eos = True

    def __init__(self, template: str = "{soft}{question} :{target}", **common: Any) -> None:
        super().__init__(template=template, **common)

    def example(self, row, labelled):
        shown = tuple(ShownPassage(name, text, rank) for rank, (name, text) in enumerate(TEXTS.items()))
        fields = self.text(row)
        if not labelled:
            return Example(fields, "", passages=shown, found=("a", "b", "c"))
        right = tuple(row["answers"])
        gold = tuple(row["gold"])
        return Example(fields, right[0] if right else "never", None, right, {}, shown, ("a", "b", "c"), gold)

    @property
    def evaluation(self):
        return QaEvaluation(Decoding(max_new_tokens=3), abstain="never")


@pytest.fixture
def options(tmp_path, tiny_folder):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    return [
        f"--backbone.name={tiny_folder('llama')}",
        "--model=PromptTuning",
        "--model.length=2",
        "--data=AsksDataModule",
        *(f"--data.{split}={path}" for split in ("train", "validation", "test", "predict")),
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run.folder={tmp_path / 'runs'}",
    ]


def read_lines(name):
    return read_rows(last_folder() / name)


@pytest.mark.wandb
def test_a_test_of_questions_is_analyzed(options, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # folders of tests can have long names
    assert main(["test", *options]) == 0
    records = read_lines("test_predictions.jsonl")
    assert [record["references"] for record in records] == [row["answers"] for row in ROWS]
    assert [record["gold"] for record in records] == [row["gold"] for row in ROWS]
    assert [passage["text"] for passage in records[0]["passages"]] == list(TEXTS.values())
    metrics = read_metrics(last_folder())["test"]
    assert metrics["test/mrr"] == pytest.approx(3 / 4)
    capsys.readouterr()
    against = ["--against", str(last_folder()), "--wandb", "offline"]
    assert main(["analyze", str(last_folder()), *against]) == 0
    assert "+0.000 [+0.000, +0.000]" in capsys.readouterr().out
    report = json.loads((last_folder() / "analysis.json").read_text())
    assert report["f1"] == pytest.approx(metrics["test/f1"], abs=1e-5)
    assert (report["f1_low"], report["f1_high"]) == pytest.approx(
        (metrics["test/f1_low"], metrics["test/f1_high"]), abs=1e-5
    )
    assert report["retrieval"]["measures"]["mrr"]["mean"] == pytest.approx(3 / 4)
    assert report["groups"]["gold documents"]["several, some shown"]["rows"] == 1
    page = (last_folder() / "analysis.html").read_text()
    tested, logged = read_runs(last_folder())
    assert logged.id == tested.id
    assert logged.is_complete
    (html,) = logged.rows("analysis.html")
    assert (logged.folder / "files" / html["analysis.html"]["path"]).read_text() == page
    assert logged.summary["f1"] == report["f1"]


def test_predictions_contain_their_passages(options):
    assert main(["predict", *options]) == 0
    record = read_lines("predictions.jsonl")[0]
    assert record["found"] == ["a", "b", "c"]
    assert record["passages"][1] == {"document": "b", "text": TEXTS["b"], "rank": 1}
    assert record["question"] == ROWS[0]["question"]
    assert "references" not in record
    assert record["scores"] is None
