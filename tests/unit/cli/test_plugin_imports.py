"""Messages about classes outside the package that an option names."""

import sys

import pytest
from torchmetrics import Metric

from lightning_softprompt.cli.parsing.parser import Parser
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.objectives.base import Objective

FILES = {
    "mine_wrong_name": "from lightning_softprompt import Objektive\n",
    "mine_syntax": "x = 1\nclass Focal(: pass\n",
    "mine_missing_package": "\nimport no_such_package\n",
    "mine_crash": "def half():\n    return 1 / 0\n\n\nhalf()\n",
    "mine_other_base": "class Focal:\n    pass\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on the import path with modules that cannot be used."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


def read_error(capsys, kind, value):
    """Returns the two lines that a parser prints about a value."""
    parser = Parser()
    parser.add_argument("--plugin", type=kind, enable_path=True)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--plugin={value}"])
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("path", "problem", "fix"),
    [
        ("mine_wrong_name.Focal", "ImportError: cannot import name 'Objektive'", "mine_wrong_name.py:1"),
        ("mine_syntax.Focal", "SyntaxError: invalid syntax", "mine_syntax.py:2"),
        ("mine_missing_package.Focal", "No module named 'no_such_package'", "mine_missing_package.py:2"),
        ("mine_crash.Focal", "ZeroDivisionError: division by zero", "mine_crash.py:2"),
        ("mine_other_base.Fokal", "no class 'Fokal'. Did you mean 'Focal'?", "mine_other_base.py: Focal"),
        ("mine_other_base.Focal", "mine_other_base.Focal is not a subclass of Objective", "derives from Objective"),
        ("no_module_here.Focal", "no module 'no_module_here' on the import path", "python -m lightning_softprompt"),
        ("json.no_part.Focal", "no module 'json.no_part' on the import path", "PYTHONPATH"),
    ],
)
def test_the_message_names_the_reason_and_the_place(folder, capsys, path, problem, fix):
    first, second = read_error(capsys, Objective | None, path)
    assert first.startswith("error: ")
    assert problem in first
    assert fix in second


@pytest.mark.parametrize("value", ["mine_other_base.Focal", "[mine_other_base.Focal]"])
def test_an_option_of_several_kinds_names_all_base_classes(folder, capsys, value):
    first, _ = read_error(capsys, Metric | Evaluation | list[Metric | Evaluation] | None, value)
    assert first == "error: mine_other_base.Focal is not a subclass of Metric or Evaluation"


def test_a_class_of_the_package_is_explained_by_its_own_options(capsys):
    first, _ = read_error(capsys, Objective | None, "{class_path: LanguageModeling, init_args: {smoothing: 1}}")
    assert "LanguageModeling has no option 'smoothing'" in first


def test_a_list_of_many_classes_is_shortened(capsys):
    _, second = read_error(capsys, Metric | None, "BrierScores")
    assert "more; or use a full import path" in second
    assert len(second) < 500
