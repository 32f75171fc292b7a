"""The tutorials run as printed, with fewer steps."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from row_files import read_rows
from runs import read_metrics

from lightning_softprompt.__main__ import main
from lightning_softprompt.runs.run_spec import last_folder

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
TICKETS = [("I was charged twice", "billing"), ("I cannot log in", "account"), ("The parcel is late", "delivery")]
SHORT = ["--trainer.max_steps=3", "--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1"]
SHORT += ["--run.wandb=disabled"]
TRAINING = ("fit", "test", "predict")
INSTRUCTION = (
    r"user\n{soft}Summarize this note in one short sentence.\n\n{document}<|im_end|>\n<|im_start|>assistant\n{target}"
)
QUESTION = (
    r"user\n{passages}\n{soft}Question: {question}\nAnswer in a few words.<|im_end|>\n<|im_start|>assistant\n{target}"
)


def read_page(name):
    return (TUTORIALS / f"{name}.md").read_text()


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def save_files(page, folder):
    """Saves each block of text or YAML under the name in the preceding sentence: "Save this as `NAME`:"."""
    pattern = r"Save this as `([^`]+)`[^\n]*\n\n```\w+\n(.*?)```"
    for name, content in re.findall(pattern, page, flags=re.DOTALL):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def split_words(line):
    """The words of a command, as bash splits them."""
    return [word[1:].replace("\\n", "\n") if word[0] == "$" else word for word in shlex.split(line)]


def commands(page):
    """The commands of a page as lists of words, without the name of the program."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    programs = r"^(softprompt|python -m lightning_softprompt) "
    return [split_words(re.sub(programs, "", line)) for line in lines if re.match(programs, line)]


def run_commands(page, *options):
    """Runs the commands of a page in order; TIME-ID is the folder of the latest run of an experiment.

    Returns:
        The folders of the runs, in order.
    """
    folders, runs = [], {}
    for words in commands(page):
        words = [re.sub(r"runs/([\w-]+)/TIME-ID", lambda match: str(runs[match[1]]), word) for word in words]
        is_training = words[0] in TRAINING
        assert main([*words, *(options if is_training else ())]) in (0, None)
        if is_training:
            runs[last_folder().parent.name] = last_folder()
            folders.append(last_folder())
    return folders


def edit(path, changes):
    """Replaces texts in a file; the file must contain each of them."""
    content = path.read_text()
    for old, new in changes.items():
        assert old in content
        content = content.replace(old, new)
    path.write_text(content)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbone")
def test_a_new_method_trains_and_its_prompt_is_saved_and_loaded(folder):
    page = read_page("new_method")
    save_files(page, folder)
    lines = [f"{text},{label}\n" for text, label in TICKETS * 4]
    (folder / "tickets.csv").write_text("text,label\n" + "".join(lines))
    names = {}
    for block in blocks(page, "python")[1:]:  # the first block is the file
        exec(re.sub(r"max_steps=\d+", "max_steps=2", block), names)
    trained = [parameter for parameter in names["model"].parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 10 + 576
    assert names["prompt"].method.offset.abs().max() > 0
    fit, predict = run_commands(page, *SHORT)
    assert "shifted_text.ShiftedText" in (fit / "config.yaml").read_text()
    records = read_rows(predict / "predictions.jsonl")
    assert {record["prediction"] for record in records} <= {"billing", "account", "delivery"}
    assert len(records) == 12
    sys.modules.pop("shifted_text")


@pytest.mark.slow
def test_a_study_compares_methods_over_seeds(folder, capsys, tiny_folder):
    page = read_page("compare_methods")
    save_files(page, folder)
    show, run, zero_shot = commands(page)
    assert main(show) == 0
    assert capsys.readouterr().out.count("to do") == 18
    labels = "{billing: good, account: bad, delivery: long, product: dull}"  # words of the tiny backbone
    options = [f"--backbone.name={tiny_folder('llama')}", f"--data.labels={labels}"]
    shorter = {"[1, 2, 3]": "[1, 2]", "max_steps: 60, val_check_interval: 20": "max_steps: 1, val_check_interval: 1"}
    edit(folder / "compare.yaml", shorter | {"DPT, ": ""})  # 100 soft tokens do not fit the tiny backbone
    assert main([*run, *options]) == 0
    rows = json.loads((folder / "studies" / "compare" / "results.json").read_text())
    accuracies = {row["compare"]["model"]: row for row in rows if row["metric"] == "accuracy"}
    assert list(accuracies) == ["PromptTuning", "PTuningV2"]
    assert all(len(row["values"]) == 2 and row["interval"] >= 0 for row in accuracies.values())
    assert "±" in capsys.readouterr().out
    assert main([*zero_shot, *options, "--run.wandb=disabled"]) == 0


@pytest.mark.slow
def test_notes_are_summarized_without_and_with_a_prompt(folder, tiny_folder):
    page = read_page("summarization")
    save_files(page, folder)
    smaller = {INSTRUCTION: "{soft}{document}{target}", "tokens: 24": "tokens: 4\n  max_tokens: 24"}
    edit(folder / "notes.yaml", smaller)
    zero_shot, fit, tuned, predictions = run_commands(page, *SHORT, f"--backbone.name={tiny_folder('llama')}")
    for run in (zero_shot, tuned):
        metrics = read_metrics(run)["test"]
        assert metrics["test/rouge1_low"] <= metrics["test/rouge1"] <= metrics["test/rouge1_high"]
        assert (run / "test_cases.html").is_file()
    assert read_metrics(fit)["trainable_parameters"] == 20 * 32
    assert len((predictions / "predictions.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
def test_instructions_are_followed_without_and_with_a_prompt(folder, tiny_folder):
    page = read_page("instruction_tuning")
    save_files(page, folder)
    edit(folder / "instructions.yaml", {"max_target_tokens: 16": "max_target_tokens: 5\n  max_tokens: 40"})
    page = page.replace("--model.length 20", "--model.length 3")
    zero_shot, fit, tuned, predict = run_commands(page, *SHORT, f"--backbone.name={tiny_folder('llama')}")
    for run in (zero_shot, tuned):
        metrics = read_metrics(run)["test"]
        assert metrics["test/cross_entropy_low"] <= metrics["test/cross_entropy"] <= metrics["test/cross_entropy_high"]
        assert 0 <= metrics["test/finished"] <= 1
        records = read_rows(run / "test_predictions.jsonl")
        nats, tokens = (sum(record[name] for record in records) for name in ("nats", "tokens"))
        assert metrics["test/cross_entropy"] == pytest.approx(nats / tokens, rel=1e-5)
    assert len(read_rows(predict / "predictions.jsonl")) == 4
    names = {}
    path = f"runs/instructions/{fit.name}/prompt.safetensors"
    exec(blocks(page, "python")[0].replace("runs/instructions/TIME-ID/prompt.safetensors", path), names)
    rows = read_rows(folder / "new_instructions.jsonl")
    asked = names["prompt"].generate([*rows[:3], {"messages": rows[3]["messages"][:3]}])
    assert asked == [record["prediction"] for record in read_rows(predict / "predictions.jsonl")]


@pytest.mark.slow
def test_questions_are_answered_from_documents(folder, tiny_folder, capsys):
    page = read_page("rag_qa")
    save_files(page, folder)
    smaller = {QUESTION: "{passages}{soft}{question} : {target}", "count: 2": "count: 1"}
    smaller["batch_size: 4"] = "batch_size: 4\n  max_tokens: 40\n  max_target_tokens: 4"
    edit(folder / "handbook.yaml", smaller)
    page = page.replace("--model.length 20", "--model.length 4")
    closed, zero_shot, _, tuned, gold = run_commands(page, *SHORT, f"--backbone.name={tiny_folder('llama')}")
    assert "Flights need the approval of the finance team" in capsys.readouterr().out
    assert "test/hit@1" not in read_metrics(closed)["test"]
    for run in (zero_shot, tuned, gold):
        assert 0 <= read_metrics(run)["test"]["test/f1"] <= 1
    assert read_metrics(tuned)["test"]["test/hit@1"] > 0.5
    analysis = json.loads((tuned / "analysis.json").read_text())
    assert analysis
    assert (tuned / "analysis.html").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbone")
def test_the_cells_of_the_notebook_run_in_order(folder, capsys):
    cells = json.loads((TUTORIALS / "notebook.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            exec(
                re.sub(r"max_steps=\d+, check_val_every_n_epoch=\d", "max_steps=2", code).replace("=12,", "=2,"), names
            )
    assert names["trainer"].learning_curve.path.is_file()
    for (metrics,) in (names["bare_metrics"], names["tuned_metrics"]):
        assert metrics["test/accuracy_low"] <= metrics["test/accuracy"] <= metrics["test/accuracy_high"]
    assert set(names["prompt"].method.classes.words) == set(names["groups"])
    assert capsys.readouterr().out.rpartition("share predicted")[2]  # the streamed answer is printed last


def test_the_outputs_of_the_notebook_are_stored_without_notices_and_machine_paths():
    notebook = json.loads((TUTORIALS / "notebook.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum("import" in "".join(cell["source"]) for cell in code) == 1
    outputs = json.dumps([cell["outputs"] for cell in code], ensure_ascii=False)
    for text in ("image/png", "Training", "accuracy"):
        assert text in outputs
    for text in ("/tmp", "/home", "/work", "💡", "GPU available", "eval mode", "Warning", "Traceback"):
        assert text not in outputs


def test_the_commands_of_the_notebook_train_and_test(folder, tiny_folder):
    cells = json.loads((TUTORIALS / "notebook.ipynb").read_text())["cells"]
    page = "".join(cells[-1]["source"])
    for name in ("tickets.csv", "new_tickets.csv"):
        lines = [f"{text},{label}\n" for text, label in TICKETS * 4]
        (folder / name).write_text("text,label\n" + "".join(lines))
    labels = "{billing: good, account: bad, delivery: long}"  # words of the tiny backbone
    options = [*SHORT, f"--backbone.name={tiny_folder('llama')}", f"--data.labels={labels}"]
    fit, test = commands(page)
    assert main([*fit, *options]) == 0
    checkpoint = last_folder() / "checkpoints" / "best.ckpt"
    assert main([*(str(checkpoint) if "TIME-ID" in word else word for word in test), "--run.wandb=disabled"]) == 0
    assert 0 <= read_metrics(last_folder())["test"]["test/accuracy"] <= 1


@pytest.mark.slow
def test_rows_are_written_filtered_and_trained_on(folder, tiny_folder):
    page = read_page("synthetic_data")
    save_files(page, folder)
    labels = "labels: {negative: negative, positive: positive}"
    smaller = {labels: "labels: {negative: bad, positive: good}", "count: 160": "count: 8", "[1, 2, 3]": "[1]"}
    smaller |= {"max_steps: 40": "max_steps: 1", "tokens: 40": "tokens: 3\n    frame: '{instruction}{target}'"}
    edit(folder / "reviews.yaml", smaller)
    write, select, study = commands(page)
    backbone = f"--backbone.name={tiny_folder('llama')}"
    shorter = ["--count=8", "--frame={instruction}{target}", "--decoding.max_new_tokens=3"]
    assert main([*write, backbone, *shorter]) == 0
    assert main(select) == 0
    rows, dropped = read_rows(folder / "clean.jsonl"), read_rows(folder / "clean.dropped.jsonl")
    assert rows
    assert len(rows) + len(dropped) == 8
    assert main([*study, backbone, "--run.wandb=disabled"]) == 0
    results = json.loads((folder / "studies" / "reviews" / "results.json").read_text())
    assert len([row for row in results if row["metric"] == "accuracy"]) == 2


@pytest.mark.slow
def test_a_policy_is_trained_against_a_reward_model(folder, tiny_folder):
    page = read_page("rlhf")
    save_files(page, folder)
    shorter = {"max_steps: 8": "max_steps: 2", "objective.answers: 4": "objective.answers: 2"}
    shorter |= {"tokens: 24": "tokens: 6", "reference_answers: 4": "reference_answers: 2", "length: 8": "length: 2"}
    limits = {
        "{path: pairs": "{max_tokens: 40, path: pairs",
        "\n        path": "\n        max_tokens: 40\n        path",
    }
    edit(folder / "rlhf.yaml", shorter | limits)  # the window of the tiny backbone
    (study,) = commands(page)
    assert main([*study, f"--backbone.name={tiny_folder('llama')}"]) == 0
    runs = folder / "studies" / "rlhf" / "all"
    rewards = [row["reward"] for row in read_rows(runs / "policy" / "rollouts.jsonl")]
    assert len(rewards) == 4
    assert len(set(rewards)) > 1
    test = read_metrics(runs / "policy.test")["test"]
    assert test["test/lift"] == pytest.approx(test["test/reward"] - test["test/reference_reward"], abs=1e-5)
    assert (runs / "policy.test" / "plots" / "test_reward_over_kl.png").is_file()
