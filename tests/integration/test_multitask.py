"""Several tasks in one run, as a user does it from the command line."""

import json

import pytest
import torch
from row_files import read_rows, write_rows
from runs import read_metrics

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
    said = [{"document": row["text"], "summary": " ".join(row["text"].split()[:2])} for row in rows]
    for name, config, own in (("mood", MOOD, rows), ("length", LENGTH, short), ("summary", SUMMARY, said)):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.yaml").write_text(config.format(folder=tmp_path))
        for split, part in {"train": own * 2, "validation": own, "test": own[:5]}.items():
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
    return tmp_path


@pytest.fixture
def fit(folder, tiny_folder):
    def fit(*options, tasks=("mood", "length", "summary"), code=0):
        given = [f"--data.tasks={json.dumps({name: str(folder / f'{name}.yaml') for name in tasks})}"]
        scores = ["--data.scores={summary: rouge1}"] if "summary" in tasks else []
        words = [
            f"--backbone.name={tiny_folder('llama')}", "--data=MultitaskDataModule", *given, *scores,
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--run.folder={folder / 'runs'}",
            "--trainer.max_epochs=-1", "--trainer.max_steps=6", "--trainer.log_every_n_steps=1",
            "--trainer.val_check_interval=3", *options,
        ]  # fmt: skip
        named = [option for option in options if option.startswith("--model=")]
        words = [word for word in words if word not in named]
        assert main(["fit", *(named or ["--model=PromptTuning"]), "--model.length=3", *words]) == code
        return last_folder() if code == 0 else None

    return fit


def metrics(folder, stage):
    return read_metrics(folder)[stage]


def lines(folder, name):
    return read_rows(folder / name)


def losses(folder):
    written = (folder / "metrics.csv").read_text().splitlines()
    column = written[0].split(",").index("train/loss")
    return [line.split(",")[column] for line in written[1:] if line.split(",")[column]]


@pytest.mark.parametrize("options", [[], ["--model=PTuningV2", "--model.readout=ClassHead"], ["--model=MPT"]])
def test_tasks_train_are_tested_and_the_mean_of_their_scores_says_which_is_best(fit, options):
    run = fit(*options)
    seen = metrics(run, "val")
    assert set(seen) >= {
        "val/mood/accuracy", "val/length/accuracy", "val/mood/recall/negative", "val/summary/rouge1"
    }  # fmt: skip
    mean = sum(seen[f"val/{name}"] for name in ("mood/accuracy", "length/accuracy", "summary/rouge1")) / 3
    assert seen["val/macro"] == pytest.approx(mean, abs=1e-6)
    assert read_metrics(run)["best"]["metric"] == "val/macro"
    assert (run / "plots" / "val_mood_confusion.png").is_file()
    assert (run / "prompt.safetensors").is_file()
    assert main(["test", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]) == 0
    tested = last_folder()
    records = lines(tested, "test_predictions.jsonl")
    assert [record["row"] for record in records] == [*range(5)] * 3  # each task has a file of its own
    assert [record["task"] for record in records] == ["mood"] * 5 + ["length"] * 5 + ["summary"] * 5
    for name in ("mood", "length"):
        own = [record for record in records if record["task"] == name]
        right = sum(record["prediction"] == record["target"] for record in own) / 5
        assert metrics(tested, "test")[f"test/{name}/accuracy"] == pytest.approx(right)


TOGETHER = ["--data.together.rows=5", "--model=MPT"]


@pytest.mark.parametrize("options", [[], TOGETHER, ["--data.together={rows: 6, tasks: 2}"]], ids=str)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(fit, options):
    how = ["--data.sampling=Temperature", "--data.sampling.temperature=3", *options]
    whole, half = fit(*how), fit(*how, "--trainer.max_steps=4")
    resumed = fit(*how, f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}")
    assert losses(whole) == losses(half) + losses(resumed)
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, resumed)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_rows_of_several_tasks_are_predicted_in_their_order(fit, folder):
    run = fit()
    asked = [
        {"task": "length", "text": "dull"},
        {"task": "summary", "document": "it is a sad story"},
        {"task": "mood", "text": "dull"},
    ]
    write_rows(folder / "asked.jsonl", asked)
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    assert main(["predict", checkpoint, f"--data.predict={folder / 'asked.jsonl'}"]) == 0
    records = lines(last_folder(), "predictions.jsonl")
    assert [record["task"] for record in records] == [row["task"] for row in asked]
    assert set(records[0]["scores"]) == set(LENGTHS)
    assert set(records[2]["scores"]) == set(MOODS)
    assert records[1]["scores"] is None
    assert records[0]["input"] == "dull is"


def test_tags_and_classes_go_together(fit, folder):
    """Words with tags beside rows with classes, each read off its own way."""
    (folder / "tags").mkdir()
    words = [{"tokens": ["a", "sad", "film"], "tags": ["O", "B-MOOD", "O"]}, {"tokens": ["dull"], "tags": ["B-MOOD"]}]
    for split in ("train", "validation", "test"):
        write_rows(folder / "tags" / f"{split}.jsonl", words * 3)
    config = {"class_path": "TaggingDataModule", "init_args": {"path": str(folder / "tags"), "batch_size": 2}}
    (folder / "tags.yaml").write_text(json.dumps(config))
    run = fit("--model=MPT", "--model.readout=AutoReadout", tasks=("mood", "tags"))
    seen = metrics(run, "val")
    assert seen["val/macro"] == pytest.approx((seen["val/mood/accuracy"] + seen["val/tags/f1"]) / 2, abs=1e-6)
    assert main(["test", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]) == 0
    records = [r for r in lines(last_folder(), "test_predictions.jsonl") if r["task"] == "tags"]
    assert [record["target"] for record in records] == [row["tags"] for row in words * 3]
    asked = [{"task": "tags", "tokens": ["a", "sad", "dog"]}, {"task": "mood", "text": "dull"}]
    write_rows(folder / "asked.jsonl", asked)
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    assert main(["predict", checkpoint, f"--data.predict={folder / 'asked.jsonl'}"]) == 0
    tags, mood = lines(last_folder(), "predictions.jsonl")
    assert len(tags["prediction"]) == 3
    assert mood["prediction"] in MOODS


def test_a_bad_row_of_a_task_and_a_missing_score_are_told_in_two_lines(fit, folder, capsys):
    fit("--data.scores={}", code=2)
    error = capsys.readouterr().err
    assert "watched by their loss" in error
    with (folder / "length" / "validation.jsonl").open("a") as file:
        file.write('{"text": "dull", "label": "tall"}\n')
    fit(code=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "task 'length'" in error[0]
    assert "validation.jsonl:7" in error[0]


def test_sources_teach_a_shared_prompt_targets_start_from_it_and_a_bank_serves_all(fit, folder, tiny_folder):
    """MPT's stages, ATTEMPT over the sources, and all prompts in one batch."""
    short = ["--run.wandb=disabled", "--trainer.max_steps=3"]
    alone = [f"--backbone.name={tiny_folder('llama')}", "--trainer.accelerator=cpu",
             "--trainer.enable_progress_bar=false", f"--run.folder={folder / 'runs'}", *short]  # fmt: skip
    teachers = {}
    for name in ("mood", "length"):
        given = ["fit", "--model=PromptTuning", "--model.length=3", f"--data={folder / f'{name}.yaml'}"]
        assert main([*given, *alone, "--trainer.max_epochs=-1"]) == 0
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
    given = ["--data=MultitaskDataModule", f"--data.tasks={json.dumps(config)}", "--model=PromptBank",
             f"--model.prompts={json.dumps(teachers)}", *alone[:4]]  # fmt: skip
    assert main(["test", *given]) == 0
    served = metrics(last_folder(), "test")
    for name in both:
        one = [f"--init_from={teachers[name]}", "--model=PromptTuning", "--model.length=3"]
        assert main(["test", *one, f"--data={folder / f'{name}.yaml'}", *alone[:4]]) == 0
        expected = metrics(last_folder(), "test")["test/accuracy"]
        assert served[f"test/{name}/accuracy"] == pytest.approx(expected)


def test_the_gradient_of_a_shared_batch_is_that_of_each_tasks_rows(fit, folder, tiny_folder):
    """One step of SGD on a batch of two tasks, beside the mean of their rows' gradients by hand."""
    tasks = {name: str(folder / f"{name}.yaml") for name in ("mood", "length")}
    how = ["--data.together={rows: 6, tasks: 2}", "--model=MPT", "--model.factors_lr=1.0",
           "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 1.0}}"]  # fmt: skip
    run = fit(*how, "--trainer.max_steps=1", "--trainer.val_check_interval=1", tasks=tuple(tasks))
    given = [f"--backbone.name={tiny_folder('llama')}", "--model=MPT", "--model.length=3", "--data=MultitaskDataModule"]
    cli = make_cli([*given, f"--data.tasks={json.dumps(tasks)}", *how], run=False)
    torch.manual_seed(42)
    cli.model.configure_model()
    before = {name: p.detach().clone() for name, p in cli.model.named_parameters() if p.requires_grad}
    batch = next(iter(cli.datamodule.train_dataloader()))
    assert sorted(batch.task_ids.tolist()) == [0, 0, 0, 1, 1, 1]
    sum(Classification()(cli.model.lm(), batch.only([b])).loss / 6 for b in range(6)).backward()
    after = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, parameter in before.items():
        gradient = cli.model.get_parameter(name).grad
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(after[name], parameter - gradient, rtol=1e-4, atol=1e-6)
