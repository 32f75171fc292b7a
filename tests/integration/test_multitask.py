"""Several tasks in one run from the command line."""

import json

import pytest
import torch
from row_files import read_rows, write_rows, write_splits
from runs import load_state, read_losses, read_metrics

from lightning_softprompt.cli.app import main, make_cli
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.runs.run_spec import last_folder

MOODS = {"positive": "good", "negative": "bad", "neutral": "one"}
LENGTHS = {"long": "long", "short": "never"}
MOOD, LENGTH, SUMMARY = (
    "class_path: ClassificationDataModule\ninit_args:\n  path: {folder}/mood\n  batch_size: 2\n  cache: false\n"
    "  template: '{{soft}}{{text}} it is{{target}}'\n  labels: {{negative: bad, neutral: one, positive: good}}\n",
    "class_path: ClassificationDataModule\ninit_args:\n  path: {folder}/length\n  batch_size: 4\n  cache: false\n"
    "  template: '{{text}} is{{soft}} {{target}}'\n  labels: {{short: never, long: long}}\n",
    "class_path: SummarizationDataModule\ninit_args:\n  path: {folder}/summary\n  batch_size: 2\n  cache: false\n"
    "  max_target_tokens: 6\n  lead: 0\n  metrics: [rouge1]\n",
)


@pytest.fixture
def folder(tmp_path, rows):
    """Three tasks, each with its files and its config."""
    short = [{"text": row["text"], "label": "long" if len(row["text"]) > 12 else "short"} for row in rows]
    summaries = [{"document": row["text"], "summary": " ".join(row["text"].split()[:2])} for row in rows]
    for name, config, task in (("mood", MOOD, rows), ("length", LENGTH, short), ("summary", SUMMARY, summaries)):
        (tmp_path / f"{name}.yaml").write_text(config.format(folder=tmp_path))
        write_splits(tmp_path / name, train=task * 2, validation=task, test=task[:5])
    return tmp_path


@pytest.fixture
def fit(folder, tiny_folder):
    def fit(*options, tasks=("mood", "length", "summary"), code=0):
        configs = {name: str(folder / f"{name}.yaml") for name in tasks}
        scores = ["--data.scores={summary: rouge1}"] if "summary" in tasks else []
        words = [
            f"--backbone.name={tiny_folder('llama')}", "--data=MultitaskDataModule",
            f"--data.tasks={json.dumps(configs)}", *scores,
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--run.folder={folder / 'runs'}",
            "--trainer.max_epochs=-1", "--trainer.max_steps=6", "--trainer.log_every_n_steps=1",
            "--trainer.val_check_interval=3", *options,
        ]  # fmt: skip
        method = [option for option in options if option.startswith("--model=")] or ["--model=PromptTuning"]
        words = [word for word in words if word not in method]
        assert main(["fit", *method, "--model.length=3", *words]) == code
        return last_folder() if code == 0 else None

    return fit


def metrics(folder, stage):
    return read_metrics(folder)[stage]


@pytest.mark.parametrize("options", [[], ["--model=PTuningV2", "--model.readout=ClassHead"], ["--model=MPT"]])
def test_tasks_train_are_tested_and_the_mean_of_their_scores_selects_the_best_checkpoint(fit, options):
    run = fit(*options)
    scores = metrics(run, "val")
    assert set(scores) >= {
        "val/mood/accuracy", "val/length/accuracy", "val/mood/recall/negative", "val/summary/rouge1"
    }  # fmt: skip
    mean = sum(scores[f"val/{name}"] for name in ("mood/accuracy", "length/accuracy", "summary/rouge1")) / 3
    assert scores["val/macro"] == pytest.approx(mean, abs=1e-6)
    assert read_metrics(run)["best"]["metric"] == "val/macro"
    assert (run / "plots" / "val_mood_confusion.png").is_file()
    assert (run / "prompt.safetensors").is_file()
    assert main(["test", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]) == 0
    tested = last_folder()
    records = read_rows(tested / "test_predictions.jsonl")
    assert [record["row"] for record in records] == [*range(5)] * 3  # each task has a separate file
    assert [record["task"] for record in records] == ["mood"] * 5 + ["length"] * 5 + ["summary"] * 5
    for name in ("mood", "length"):
        of_task = [record for record in records if record["task"] == name]
        accuracy = sum(record["prediction"] == record["target"] for record in of_task) / 5
        assert metrics(tested, "test")[f"test/{name}/accuracy"] == pytest.approx(accuracy)


TOGETHER = ["--data.together.rows=5", "--model=MPT"]


@pytest.mark.parametrize("options", [[], TOGETHER, ["--data.together={rows: 6, tasks: 2}"]], ids=str)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(fit, options):
    options = ["--data.sampling=Temperature", "--data.sampling.temperature=3", *options]
    uninterrupted, half = fit(*options), fit(*options, "--trainer.max_steps=4")
    resumed = fit(*options, f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}")
    assert read_losses(uninterrupted) == read_losses(half) + read_losses(resumed)
    states = [load_state(uninterrupted), load_state(resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_rows_of_several_tasks_are_predicted_in_their_order(fit, folder):
    run = fit()
    rows = [
        {"task": "length", "text": "dull"},
        {"task": "summary", "document": "it is a sad story"},
        {"task": "mood", "text": "dull"},
    ]
    write_rows(folder / "rows.jsonl", rows)
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    assert main(["predict", checkpoint, f"--data.predict={folder / 'rows.jsonl'}"]) == 0
    records = read_rows(last_folder() / "predictions.jsonl")
    assert [record["task"] for record in records] == [row["task"] for row in rows]
    assert set(records[0]["scores"]) == set(LENGTHS)
    assert set(records[2]["scores"]) == set(MOODS)
    assert records[1]["scores"] is None
    assert records[0]["input"] == "dull is"


def test_a_tagging_and_a_classification_task_train_together(fit, folder):
    """Each row uses the readout of its task."""
    words = [{"tokens": ["a", "sad", "film"], "tags": ["O", "B-MOOD", "O"]}, {"tokens": ["dull"], "tags": ["B-MOOD"]}]
    write_splits(folder / "tags", train=words * 3, validation=words * 3, test=words * 3)
    config = {"class_path": "TaggingDataModule", "init_args": {"path": str(folder / "tags"), "batch_size": 2}}
    (folder / "tags.yaml").write_text(json.dumps(config))
    run = fit("--model=MPT", "--model.readout=AutoReadout", tasks=("mood", "tags"))
    scores = metrics(run, "val")
    assert scores["val/macro"] == pytest.approx((scores["val/mood/accuracy"] + scores["val/tags/f1"]) / 2, abs=1e-6)
    assert main(["test", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]) == 0
    records = [r for r in read_rows(last_folder() / "test_predictions.jsonl") if r["task"] == "tags"]
    assert [record["target"] for record in records] == [row["tags"] for row in words * 3]
    rows = [{"task": "tags", "tokens": ["a", "sad", "dog"]}, {"task": "mood", "text": "dull"}]
    write_rows(folder / "rows.jsonl", rows)
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    assert main(["predict", checkpoint, f"--data.predict={folder / 'rows.jsonl'}"]) == 0
    tags, mood = read_rows(last_folder() / "predictions.jsonl")
    assert len(tags["prediction"]) == 3
    assert mood["prediction"] in MOODS


def test_a_bad_row_of_a_task_and_a_missing_score_are_reported(fit, folder, capsys):
    fit("--data.scores={}", code=2)
    error = capsys.readouterr().err
    assert "monitored by their loss" in error
    with (folder / "length" / "validation.jsonl").open("a") as file:
        file.write('{"text": "dull", "label": "tall"}\n')
    fit(code=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "task 'length'" in error[0]
    assert "validation.jsonl:7" in error[0]


def test_a_shared_prompt_is_distilled_targets_start_from_it_and_a_bank_serves_all_tasks(fit, folder, tiny_folder):
    """Runs the stages of MPT, ATTEMPT with the source prompts, and all prompts in one batch."""
    short = ["--run.wandb=disabled", "--trainer.max_steps=3"]
    alone = [f"--backbone.name={tiny_folder('llama')}", "--trainer.accelerator=cpu",
             "--trainer.enable_progress_bar=false", f"--run.folder={folder / 'runs'}", *short]  # fmt: skip
    teachers = {}
    for name in ("mood", "length"):
        command = ["fit", "--model=PromptTuning", "--model.length=3", f"--data={folder / f'{name}.yaml'}"]
        assert main([*command, *alone, "--trainer.max_epochs=-1"]) == 0
        teachers[name] = str(last_folder() / "prompt.safetensors")
    both = ("mood", "length")
    distilled = f"{{class_path: Distillation, init_args: {{teachers: {list(teachers.values())}, hidden: 0.1}}}}"
    source = fit("--model=MPT", f"--model.objective={distilled}", *short, tasks=both)
    path = source / "prompt.safetensors"
    start = [f"--model.init={{class_path: FromCheckpoint, init_args: {{path: {path}, name: shared}}}}",
             f"--model.start={{class_path: FromTasks, init_args: {{path: {path}}}}}"]  # fmt: skip
    target = fit("--model=MPT", *start, *short, tasks=("summary",))
    assert "val/summary/rouge1" in metrics(target, "val")
    sources = ", ".join(f"{{class_path: FromCheckpoint, init_args: {{path: {p}}}}}" for p in teachers.values())
    attempt = fit("--model=ATTEMPT", f"--model.sources=[{sources}]", *short, tasks=both)
    assert main(["test", f"--ckpt_path={attempt / 'checkpoints' / 'best.ckpt'}"]) == 0
    config = {name: str(folder / f"{name}.yaml") for name in both}
    bank = ["--data=MultitaskDataModule", f"--data.tasks={json.dumps(config)}", "--model=PromptBank",
            f"--model.prompts={json.dumps(teachers)}", *alone[:4]]  # fmt: skip
    assert main(["test", *bank]) == 0
    served = metrics(last_folder(), "test")
    for name in both:
        teacher = [f"--init_from={teachers[name]}", "--model=PromptTuning", "--model.length=3"]
        assert main(["test", *teacher, f"--data={folder / f'{name}.yaml'}", *alone[:4]]) == 0
        expected = metrics(last_folder(), "test")["test/accuracy"]
        assert served[f"test/{name}/accuracy"] == pytest.approx(expected)


def test_the_gradient_of_a_shared_batch_is_the_mean_over_the_rows_of_all_tasks(fit, folder, tiny_folder):
    """Compares one step of SGD on a batch of two tasks with the mean gradient of its rows, one by one."""
    tasks = {name: str(folder / f"{name}.yaml") for name in ("mood", "length")}
    options = ["--data.together={rows: 6, tasks: 2}", "--model=MPT", "--model.factors_lr=1.0",
           "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 1.0}}"]  # fmt: skip
    run = fit(*options, "--trainer.max_steps=1", "--trainer.val_check_interval=1", tasks=tuple(tasks))
    data = ["--data=MultitaskDataModule", f"--data.tasks={json.dumps(tasks)}"]
    method = [f"--backbone.name={tiny_folder('llama')}", "--model=MPT", "--model.length=3"]
    cli = make_cli([*method, *data, *options], run=False)
    torch.manual_seed(42)
    cli.model.configure_model()
    before = {name: p.detach().clone() for name, p in cli.model.named_parameters() if p.requires_grad}
    batch = next(iter(cli.datamodule.train_dataloader()))
    assert sorted(batch.task_ids.tolist()) == [0, 0, 0, 1, 1, 1]
    lm = cli.model.lm()
    losses = [Classification()(lm, batch.only([b])).loss for b in range(6)]
    (sum(losses) / 6).backward()
    after = load_state(run)
    for name, parameter in before.items():
        gradient = cli.model.get_parameter(name).grad
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(after[name], parameter - gradient, rtol=1e-4, atol=1e-6)
