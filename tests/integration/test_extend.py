"""The plug-ins of `docs/extend/plugins.md`, each one file outside the package, run by the commands of the page."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from row_files import write_rows
from runs import read_metrics

from lightning_softprompt.__main__ import main
from lightning_softprompt.retrieval.reranker import Reranker
from lightning_softprompt.runs.run_spec import last_folder

PAGE = (Path(__file__).parents[2] / "docs" / "extend" / "plugins.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch, rows):
    """A folder with the files of the page, and with reviews."""
    files = {block.split()[1]: block for block in re.findall(r"```python\n(# .*?)```", PAGE, flags=re.DOTALL)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    reviews = [{"text": row["text"], "stars": 1 + number % 5} for number, row in enumerate(rows * 3)]
    write_rows(tmp_path / "reviews.jsonl", reviews)
    choices = re.search(r"```json\n(\{\"question\".*?)```", PAGE, flags=re.DOTALL)[1]
    (tmp_path / "choices.jsonl").write_text(choices)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in files:
        sys.modules.pop(Path(name).stem, None)


def commands():
    block = re.search(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)[1].replace("\\\n", " ")
    return [shlex.split(line)[3:] for line in block.splitlines()]


COMMANDS = commands()
METRICS = ["stars_error"] * 5 + ["accuracy"]


def test_the_page_has_all_files(folder):
    assert len(list(folder.glob("*.py"))) == 14


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbone")
@pytest.mark.parametrize(("words", "metric"), zip(COMMANDS, METRICS, strict=True), ids=range(1, len(COMMANDS) + 1))
def test_plug_ins_of_single_files_train(folder, words, metric):
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--run.wandb=disabled"]
    assert main([*words, *short]) == 0
    report = read_metrics(last_folder())
    assert report["best"]["metric"] == f"val/{metric}"
    assert 0 <= report["best"]["value"] <= 4


def test_a_reranker_of_a_single_file_orders_passages(folder):
    reranker = importlib.import_module("shared_words").SharedWords()
    passages = [SimpleNamespace(text="The canteen is open."), SimpleNamespace(text="Who approves flights by plane?")]
    assert reranker.scores("Who approves flights", passages) == [0.0, 1.0]
    assert isinstance(reranker, Reranker)
