"""The commands and examples of the README and the guide work, on a shallow copy of the real backbone."""

import re
import shlex
from pathlib import Path

import pytest
from row_files import read_rows, write_rows, write_splits

from lightning_softprompt.__main__ import main
from lightning_softprompt.data.samples.movie_sentences import movie_sentences
from lightning_softprompt.runs.run_spec import last_folder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = (README, (ROOT / "docs" / "guide" / "tasks.md").read_text())
SHORT = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=2"]
SHORT += ["--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]


def commands(pages=PAGES):
    """The `softprompt` lines of all `bash` blocks, joined where a line ends with a backslash."""
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line[line.index("softprompt ") :] for line in lines if "softprompt " in line]


DOCUMENT = "The lamp in the hall is broken again. It went out twice last week, and nobody has mended it since."
ROW = {"document": DOCUMENT, "summary": "The lamp is still broken."}


def write_documents(folder):
    """A folder of documents with summaries, and a file of documents alone."""
    write_splits(folder, train=[ROW] * 8, validation=[ROW] * 8, test=[ROW] * 8)
    write_rows(folder / "documents.jsonl", [{"document": DOCUMENT}])
    return folder


def write_questions(folder):
    """A folder of questions and of the documents that answer them."""
    row = {"question": "What is broken?", "answers": ["the lamp"], "positive_ids": ["hall"]}
    write_splits(folder, train=[row] * 4, validation=[row] * 4, test=[row] * 4)
    corpus = [
        {"id": "hall", "title": "", "text": DOCUMENT},
        {"id": "yard", "title": "", "text": "A dog barks."},
    ]
    write_rows(folder / "corpus.jsonl", corpus)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbone")
@pytest.mark.timeout(600)
def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    texts = write_documents(tmp_path / "texts")
    places = {"PATH/TO/scitldr": texts, "documents.jsonl": texts / "documents.jsonl"}
    places |= {"QUESTIONS": write_questions(tmp_path / "questions"), "indexes/mine": tmp_path / "index"}
    trained, predictions = None, []
    for command in commands():
        words = shlex.split(command)[1:]
        words = [str(places.get(word, word)) for word in words]
        words = [str(movie_sentences()) if word == "PATH/TO/sst2" else word for word in words]
        words = [re.sub("runs/[a-z]+/TIME-ID", str(trained), word) for word in words]
        if words[-2:] == ["--data.predict", "-"]:
            path = tmp_path / "input.txt"
            path.write_text('{"text": "A joyless, endless film."}\n')
            words = [*words[:-1], str(path.with_suffix(".jsonl"))]
            path.rename(words[-1])
        assert main([*words, *SHORT, f"--run.folder={tmp_path / 'runs'}"]) in (0, None)
        trained = last_folder() if words[0] == "fit" else trained
        if words[0] == "predict":
            predictions.append(read_rows(last_folder() / "predictions.jsonl")[0]["prediction"])
    label, summary = predictions
    assert label in ("negative", "positive")
    assert summary


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbone")
def test_the_first_tutorial_runs_as_printed(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "tutorials" / "first_prompt.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, content in re.findall(r"Save this as `([^`]+)`[^\n]*\n\n```text\n(.*?)```", page, flags=re.DOTALL):
        (tmp_path / name).write_text(content)
    fit, evaluate, predict, fit_table, evaluate_table = (shlex.split(command)[1:] for command in commands([page]))
    short = ["--trainer.max_steps=3", "--trainer.check_val_every_n_epoch=1", "--run.wandb=disabled"]
    assert main([*fit, *short]) == 0
    trained = str(last_folder())
    assert main([word.replace("runs/default/TIME-ID", trained) for word in evaluate]) == 0
    assert len(read_rows(last_folder() / "test_predictions.jsonl")) == 6
    assert main([word.replace("runs/default/TIME-ID", trained) for word in predict]) == 0
    records = read_rows(last_folder() / "predictions.jsonl")
    assert len(records) == 6
    assert {record["prediction"] for record in records} <= {"billing", "login", "delivery"}
    assert main([*fit_table, *short]) == 0
    trained = str(last_folder())
    assert main([word.replace("runs/one-table/TIME-ID", trained) for word in evaluate_table]) == 0
    records = read_rows(last_folder() / "test_predictions.jsonl")
    assert sorted(record["target"] for record in records) == ["billing", "delivery", "login"]


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbone")
def test_the_quickstart_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", f"--folder={tmp_path}", *SHORT]) == 0
    out = capsys.readouterr().out
    for part in ("zero-shot", "soft prompt", "11,520 (0.0325 %", "paired bootstrap", "learning_curve.png"):
        assert part in out


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def run_quickly(code, names):
    """Runs a block of Python with fewer steps."""
    exec(re.sub(r"max_steps=\d+", "max_steps=2", code), names)


def tickets():
    """The table of the first tutorial."""
    page = (ROOT / "docs" / "tutorials" / "first_prompt.md").read_text()
    return re.search(r"```text\n(.*?)```", page, flags=re.DOTALL)[1]


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbone")
def test_the_python_example_works_as_printed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tickets").mkdir()
    (tmp_path / "tickets" / "train.csv").write_text(tickets())
    names = {}
    run_quickly(python_blocks(README)[0], names)
    assert names["model"].tokens.shape == (20, 576)
    assert names["prompt"].predict(["Where is my refund?"])[0]["prediction"] in ("billing", "login", "delivery")


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbone")
def test_the_python_tutorial_works_as_printed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    page = (ROOT / "docs" / "tutorials" / "python.md").read_text()
    for block in python_blocks(page):
        run_quickly(block, names)
    assert [record["prediction"] in ("billing", "login", "delivery") for record in names["records"]] == [True, True]
    assert len(names["summaries"]) == 2
    assert len([record for batch in names["batches"] for record in batch]) == 11  # 12 rows, one of them is held out


def test_each_source_of_rows_takes_five_lines_and_one_import():
    page = (ROOT / "docs" / "tutorials" / "python.md").read_text()
    section = page.partition("## Other sources of rows\n")[2].partition("\n## ")[0]
    blocks = python_blocks(section)
    for source in ("pd.DataFrame", "datasets.Dataset", "DataLoader"):
        assert any(source in block for block in blocks)
    for block in blocks:
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) <= 5
        assert sum("import " in line for line in lines) <= 1


def test_numbers_in_the_text_are_those_of_its_table():
    """The sentence under the table repeats the difference of the table."""
    bare, tuned = re.search(r"accuracy \(95 %.*?\| ([\d.]+) \[.*?\| ([\d.]+) \[", README).groups()
    lift = re.search(r"gain in accuracy is \+([\d.]+)", README)[1]
    assert float(tuned) - float(bare) == pytest.approx(float(lift), abs=1e-6)
