"""`softprompt methods --advise`: measured methods within a budget, and the recommendations of the guide."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_softprompt.cli.commands import methods
from lightning_softprompt.cli.method_advice import (
    Comparison,
    MeasuredMethod,
    Question,
    advise,
    read_choices,
    read_comparisons,
)
from lightning_softprompt.system.errors import CommandError

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "methods.md"
HEADER = "| task, data and constraints | choose | measured |\n|---|---|---|\n"


def measured(name, mean, parameters, seconds=1.0):
    options = {"model": name, "model.length": 20}
    return MeasuredMethod(name, options, mean, [mean - 0.01, mean + 0.01], 5, parameters, {"cpu": seconds})


FULL, PREFIX = measured("Full", 0.92, 134_000_000, 9.0), measured("Prefix", 0.91, 1_500_000, 2.0)
PROMPT, BARE = measured("Prompt", 0.90, 11_520), measured("Bare", 0.60, 0)
UNDECIDED = [["Full", "Prefix"], ["Prefix", "Prompt"]]


def comparison(rows=4800, task="sst2", methods=(FULL, PREFIX, PROMPT, BARE)):
    return Comparison(task, "classification", "model", rows, 300, "accuracy", "max", methods, UNDECIDED)


def advice(*comparisons, **question):
    return "\n".join(advise(Question(**question), comparisons, read_choices()))


def test_the_smallest_method_that_is_not_shown_to_differ_from_the_best_is_chosen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a row of the table is one line
    text = advice(comparison(), task="classification")
    assert "Choose Prefix: not shown to differ from Full, with fewer parameters." in text
    assert "softprompt fit --model Prefix --model.length 20 ..." in text
    status = {name: re.search(rf"^{name} .*", text, re.MULTILINE)[0] for name in ("Full", "Prefix", "Prompt", "Bare")}
    assert "0.920 [0.910, 0.930] (5 seeds)  best " in status["Full"]
    assert "no difference shown" in status["Prefix"]
    assert "1,500,000    6 MB" in status["Prefix"]
    assert "2.00 cpu" in status["Prefix"]
    assert "worse" in status["Prompt"]


def test_a_budget_excludes_methods_and_compares_the_others_with_the_best_of_them():
    text = advice(comparison(), task="classification", max_parameters=2_000_000)
    assert "Full" not in text
    assert "Choose Prompt: not shown to differ from Prefix, with fewer parameters." in text
    text = advice(comparison(), task="classification", max_seconds=1.5)
    assert "Choose Prompt: the best one." in text
    assert "No measured method is within the budget." in advice(comparison(methods=[FULL]), max_parameters=5)


def test_the_nearest_number_of_rows_is_shown_and_a_far_one_announced():
    few, many = comparison(rows=32), comparison(rows=4800)
    text = advice(few, many, task="sst2", rows=64)
    assert "up to 32 training rows" in text
    assert "up to 4,800 training rows" not in text
    assert "nearest one" not in text
    assert "No comparison has about 64 rows; this is the nearest one." in advice(many, task="sst2", rows=64)
    assert "up to 4,800 training rows" in advice(few, many, task="sst2")


def test_a_task_without_measurements_gets_the_recommendations_of_the_guide():
    text = advice(comparison(), task="qa")
    assert text.startswith("Not measured yet by the evidence queue: qa. The guide recommends:")
    assert "answers from long passages" in text
    assert "Choose" not in text
    assert "summarization" not in text
    assert "do not take --max-parameters" in advice(task="qa", max_parameters=100)


def test_recommendations_are_for_the_number_of_rows():
    assert "4 rows per class" in advice(task="classification", rows=8)
    assert "hundreds of rows" not in advice(task="classification", rows=8)
    assert "hundreds of rows" in advice(task="classification", rows=5000)


def test_an_unknown_task_is_an_error_with_a_suggestion():
    with pytest.raises(CommandError, match="unknown task 'clasification'; did you mean classification"):
        advice(task="clasification")
    with pytest.raises(CommandError, match=r"choose one of classification, .*, sst2"):
        advice(comparison(), task="chess")


def test_the_recommendations_are_the_table_of_the_guide():
    lines = GUIDE.read_text().split(HEADER)[1].partition("\n\n")[0].splitlines()
    choices = [f"| {choice.situation} | {choice.choose} | {choice.measured} |" for choice in read_choices()]
    assert choices == lines, "update lightning_softprompt/methods/choices.yaml"


def test_the_measurements_of_the_package_can_be_read():
    for each in read_comparisons():
        assert len(each.methods) > 1
        assert each.mode in ("min", "max")


def test_the_command_prints_advice(capsys):
    assert methods.main(["--advise", "--task", "classification", "--rows", "64"]) == 0
    assert "PromptTuning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "3"], "--rows requires --advise"),
        (["--max-seconds", "3"], "--max-seconds requires --advise"),
        (["DePT", "--advise"], "takes no name"),
    ],
)
def test_options_that_have_no_effect_are_errors(words, message):
    with pytest.raises(CommandError, match=message):
        methods.main(words)


def test_a_number_of_rows_is_positive(capsys):
    with pytest.raises(SystemExit):
        methods.main(["--advise", "--rows", "0"])
    assert "--rows" in capsys.readouterr().err


def test_advice_imports_no_torch():
    code = (
        "import sys; from lightning_softprompt.__main__ import main; main(['methods', '--advise']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
