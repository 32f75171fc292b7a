"""`import lightning_softprompt as sp`: its names, training, and prompts in Python."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from lightning import seed_everything
from lightning.pytorch.callbacks import EarlyStopping

import lightning_softprompt as sp
from lightning_softprompt.checkpoints.prompt_file import read_prompt, write_prompt
from lightning_softprompt.cli.app import main as command
from lightning_softprompt.data.sampling.shared_batches import SharedBatches
from lightning_softprompt.prompts.init import FromText
from lightning_softprompt.runs.run_spec import RunSpec, last_folder

TEMPLATE = "{soft}{text} it was {target}"
LABELS = {"positive": "good", "negative": "bad"}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


@pytest.fixture
def spec(tiny_folder):
    return sp.BackboneSpec(name=str(tiny_folder("llama")))


@pytest.fixture
def two_classes(rows):
    return [row for row in rows if row["label"] in LABELS] * 4


@pytest.fixture
def data(spec, two_classes):
    return sp.ClassificationDataModule(
        backbone=spec, train=two_classes, template=TEMPLATE, labels=LABELS, batch_size=4, cache=False
    )


def test_every_public_name_is_there():
    for name in sp.__all__:
        assert getattr(sp, name).__name__ == name
    assert set(sp.__all__) <= set(dir(sp))
    with pytest.raises(AttributeError, match="no attribute 'PromptTunning'"):
        sp.PromptTunning  # noqa: B018


def test_every_method_is_a_public_name():
    from lightning_softprompt import methods

    assert set(methods.__all__) <= set(sp.__all__)


def test_the_import_loads_no_torch():
    names = ("torch", "lightning", "transformers", "numpy")
    code = f"import sys, lightning_softprompt; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_method_takes_what_it_needs_from_the_data_module(data):
    model = sp.PromptTuning(length=3, data=data)
    given = sp.PromptTuning(length=3, backbone=data.spec, classes=data.classes, evaluation=data.evaluation)
    assert model.spec == data.spec
    assert model.classes == data.classes
    assert model.hparams == given.hparams
    assert set(model.evaluations) == {"val", "test"}


def test_explicit_arguments_take_precedence_over_the_data_module(data):
    other = sp.BackboneSpec(name="other")
    model = sp.PromptTuning(length=3, data=data, backbone=other)
    assert model.spec == other
    assert model.hparams["backbone"]["init_args"]["name"] == "other"


def test_training_leaves_a_prompt_that_predicts_as_the_method_does(data, two_classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed_everything(1)
    model = sp.PromptTuning(length=3, data=data)
    trainer = sp.Trainer(max_epochs=2, **QUIET)
    trainer.fit(model, data)
    assert trainer.prompt_path.name == "prompt.safetensors"
    assert trainer.prompt_path.parents[1] == tmp_path / "runs" / "default"
    assert json.loads((trainer.prompt_path.parent / "metrics.json").read_text())["global_step"] == trainer.global_step

    prompt = sp.load_prompt(trainer.prompt_path, backbone=model.loaded)
    assert prompt.backbone is model.loaded
    texts = [row["text"] for row in two_classes[:5]]
    records = prompt.predict(texts, batch_size=2)
    assert {record["prediction"] for record in records} <= set(LABELS)
    assert sum(records[0]["scores"].values()) == pytest.approx(1)

    asked = sp.ClassificationDataModule(
        backbone=data.spec, predict=[{"text": text} for text in texts], template=TEMPLATE, labels=LABELS, cache=False
    )
    best = sp.SoftPromptModule.load_from_checkpoint(
        trainer.prompt_path.parent / "checkpoints" / "best.ckpt", evaluation=data.evaluation
    )
    expected = sp.Trainer(run=None, **QUIET).predict(best, asked)
    for record, other in zip(records, [one for batch in expected for one in batch], strict=True):
        assert record["prediction"] == other["prediction"]
        assert record["scores"] == pytest.approx(other["scores"], abs=1e-5)


@pytest.fixture
def row_files(two_classes, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in two_classes))
    return folder


def test_commands_use_the_checkpoints_of_a_run_in_python(spec, row_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = sp.ClassificationDataModule(TEMPLATE, LABELS, backbone=spec, path="rows", batch_size=4, cache=False)
    optimizer = partial(torch.optim.AdamW, lr=0.1)
    model = sp.PromptTuning(length=3, data=data, init=FromText("good"), optimizer=optimizer, readout=sp.Calibrated)
    trainer = sp.Trainer(max_steps=2, precision="32-true", run=RunSpec(experiment="mine"), **QUIET)
    trainer.fit(model, data)
    folder = trainer.prompt_path.parent
    record = json.loads((folder / "run.json").read_text())
    assert record["order"] == 1
    assert "not_in_config" not in record
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 2
    assert config["run"]["experiment"] == "mine"
    assert "PromptTuning" in (folder / "prompt.md").read_text()
    for start in (f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", f"--init_from={trainer.prompt_path}"):
        assert command(["test", start, "--run.wandb=disabled"]) == 0
        assert last_folder().parent.name == "mine"
        (metrics,) = sp.Trainer(run=None, **QUIET).test(model, data, verbose=False)
        tested = json.loads((last_folder() / "metrics.json").read_text())["test"]
        assert tested["test/accuracy"] == pytest.approx(metrics["test/accuracy"])
    assert command(["fit", "--config", str(folder / "config.yaml"), "--run.wandb=disabled"]) == 0


def test_a_run_in_python_is_resumed_exactly_by_python_and_by_the_command(
    spec, row_files, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.chdir(tmp_path)

    def train(max_steps, ckpt_path=None):
        seed_everything(1)
        data = sp.ClassificationDataModule(TEMPLATE, LABELS, backbone=spec, path="rows", batch_size=4, cache=False)
        model = sp.PromptTuning(length=3, prompt_dropout=0.3, data=data)
        trainer = sp.Trainer(max_steps=max_steps, **QUIET)
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return model.tokens.detach(), trainer.prompt_path.parent / "checkpoints" / "last.ckpt"

    whole, _ = train(6)
    half, checkpoint = train(4)
    resumed, _ = train(6, checkpoint)
    assert torch.equal(resumed, whole)
    assert not torch.equal(half, whole)
    settings = torch.load(checkpoint, weights_only=True)["settings"]
    assert settings["data.template"] == TEMPLATE
    assert settings["train_rows"].startswith(f"{len((row_files / 'train.jsonl').read_text().splitlines())} rows")

    resume = ["fit", f"--ckpt_path={checkpoint}", "--trainer.max_steps=6", "--run.wandb=disabled"]
    assert command([*resume, "--data.template={soft}{text} {target}"]) == 2
    assert "data.template was" in capsys.readouterr().err
    assert command(resume) == 0
    assert "earlier version" not in caplog.text
    saved = torch.load(last_folder() / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["tokens"], whole)


def test_settings_that_are_objects_are_not_in_the_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = sp.Trainer(max_steps=1, callbacks=[EarlyStopping("val/loss", strict=False)], **QUIET)
    trainer.fit(sp.PromptTuning(length=3, data=data), data)
    checkpoint = torch.load(trainer.prompt_path.parent / "checkpoints" / "last.ckpt", weights_only=True)
    assert "trainer.callbacks" not in checkpoint["settings"]
    assert checkpoint["settings"]["trainer.precision"] == "32-true"
    assert {"train_rows", "validation_rows"} <= set(checkpoint["settings"])


def test_what_a_config_cannot_express_is_left_out_and_listed(data, two_classes, row_files, tmp_path, monkeypatch):
    class OwnPrompt(sp.PromptTuning):
        """A class inside a function, which no other program can import."""

    monkeypatch.chdir(tmp_path)
    stop = EarlyStopping("val/loss", strict=False)
    trainer = sp.Trainer(max_steps=1, callbacks=[stop], **QUIET)
    trainer.fit(sp.PromptTuning(length=3, data=data), data)
    folder = trainer.prompt_path.parent
    left_out = json.loads((folder / "run.json").read_text())["not_in_config"]
    assert left_out == {
        "trainer.callbacks": "an object of EarlyStopping was passed in Python",
        "data.train": "its rows were passed in Python",
    }
    text = (folder / "config.yaml").read_text()
    assert "# data.train is missing: its rows were passed in Python" in text
    start = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    assert command(["test", start, "--run.wandb=disabled"]) == 2  # the rows are in no file
    assert command(["test", start, "--run.wandb=disabled", f"--data.test={row_files / 'test.jsonl'}"]) == 0
    trainer = sp.Trainer(max_steps=1, **QUIET)
    trainer.fit(OwnPrompt(length=3, data=data), data)
    record = json.loads((trainer.prompt_path.parent / "run.json").read_text())
    assert "OwnPrompt cannot be imported" in record["not_in_config"]["model"]
    assert record["order"] == 2
    assert "model" not in yaml.safe_load((trainer.prompt_path.parent / "config.yaml").read_text())


def test_several_tasks_are_in_the_config_of_a_run_in_python(spec, row_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = (
        sp.ClassificationDataModule(TEMPLATE, LABELS, backbone=spec, path=str(row_files), batch_size=size, cache=False)
        for size in (2, 4)
    )
    data = sp.MultitaskDataModule({"one": one, "other": other}, together=SharedBatches())
    trainer = sp.Trainer(max_steps=1, **QUIET)
    trainer.fit(sp.MPT(length=3, data=data), data)
    checkpoint = trainer.prompt_path.parent / "checkpoints" / "last.ckpt"
    assert command(["test", f"--ckpt_path={checkpoint}", "--run.wandb=disabled"]) == 0
    assert "test/one/accuracy" in json.loads((last_folder() / "metrics.json").read_text())["test"]


def test_the_backbone_is_found_by_name(data, tmp_path):
    model = sp.PromptTuning(length=3, data=data)
    model.configure_model()
    path = sp.save_prompt(model, tmp_path / "prompt.safetensors")
    prompt = sp.load_prompt(str(path))
    assert torch.equal(prompt.method.tokens, model.tokens)
    assert prompt.backbone is not model.loaded
    again = sp.load_prompt(sp.save_prompt(prompt.method, tmp_path / "again.safetensors"), backbone=prompt.backbone)
    assert again.predict("a warm film") == prompt.predict("a warm film")


def test_a_run_may_write_no_files(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = sp.Trainer(max_steps=1, run=None, **QUIET)
    model = sp.PromptTuning(length=3, data=data)
    trainer.fit(model, data)
    assert trainer.prompt_path is None
    assert not list(tmp_path.iterdir())
    assert sp.Prompt(model).predict("dull")[0]["prediction"] in LABELS


def test_rows_are_a_data_set_of_the_datasets_package(spec, two_classes):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(two_classes)
    data = sp.ClassificationDataModule(backbone=spec, train=rows, validation=rows, template=TEMPLATE, cache=False)
    assert list(data.classes.words) == ["negative", "positive"]
    assert len(data.split("train")) == len(two_classes)


def test_rows_are_a_pandas_data_frame(spec, two_classes, tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    rows = pandas.DataFrame([{"text": row["text"], "label": LABELS[row["label"]]} for row in two_classes])
    data = sp.ClassificationDataModule(backbone=spec, train=rows, validation=rows, template=TEMPLATE, cache=False)
    assert list(data.classes.words) == ["bad", "good"]
    assert [example.fields["text"] for example in data.split("train").examples] == list(rows["text"])
    trainer = sp.Trainer(max_steps=1, **QUIET)
    trainer.fit(sp.PromptTuning(length=3, data=data), data)
    assert "its rows were passed in Python" in (trainer.prompt_path.parent / "config.yaml").read_text()


def test_batches_come_from_a_loader_of_torch(data):
    model = sp.PromptTuning(length=3, data=data)
    loader = torch.utils.data.DataLoader(data.split("train"), batch_size=2, shuffle=True, collate_fn=data.collate)
    trainer = sp.Trainer(max_steps=2, run=None, **QUIET)
    trainer.fit(model, loader)
    assert trainer.global_step == 2
    assert sp.Prompt(model).predict("dull")[0]["prediction"] in LABELS


def test_own_loaders_follow_a_training_with_a_data_module(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = sp.PromptTuning(length=3, data=data)
    trainer = sp.Trainer(max_steps=1, **QUIET)
    trainer.fit(model, data)
    loader = torch.utils.data.DataLoader(data.split("train"), batch_size=2, collate_fn=data.collate)
    records = [record for batch in trainer.predict(model, loader, ckpt_path="best") for record in batch]
    assert [record["row"] for record in records] == list(range(len(data.split("train"))))
    (metrics,) = trainer.test(model, loader)  # the data module has no test rows
    (same,) = trainer.validate(model, dataloaders=loader)
    assert metrics["test/accuracy"] == same["val/accuracy"]
    assert trainer.datamodule is data
    other = sp.PromptTuning(length=3, data=data)
    trainer.fit(other, loader)
    assert trainer.datamodule is None
    assert other.row_formats == model.row_formats


@pytest.mark.parametrize("rows", [[{"text": "dull"}], {"train": [{"text": "dull"}]}])
def test_rows_given_as_path_are_refused(rows, spec):
    with pytest.raises(ValueError, match="train="):
        sp.ClassificationDataModule(backbone=spec, path=rows, template=TEMPLATE)


def test_splits_given_as_rows_are_refused(spec, two_classes):
    data = sp.ClassificationDataModule(backbone=spec, train={"train": two_classes}, template=TEMPLATE, labels=LABELS)
    with pytest.raises(ValueError, match=r"got dict; give one split, such as splits\['train'\]"):
        data.split("train")


@pytest.fixture
def summaries(spec):
    rows = [{"document": "a warm and funny film", "summary": "very good"}] * 8
    return sp.SummarizationDataModule(
        backbone=spec, train=rows, template="{soft}{document} it was {target}", max_tokens=24, max_target_tokens=6,
        batch_size=4, cache=False,
    )  # fmt: skip


def test_answers_are_generated(summaries, tmp_path):
    trainer = sp.Trainer(max_steps=2, run=RunSpec(folder=str(tmp_path)), **QUIET)
    trainer.fit(sp.PromptTuning(length=3, data=summaries), summaries)
    prompt = sp.load_prompt(trainer.prompt_path)
    texts = ["a warm film", "a sad story about a dog", "dull"]
    answers = prompt.generate(texts, batch_size=2, max_new_tokens=4)
    assert len(answers) == 3
    assert [record["prediction"] for record in prompt.predict(texts)] == prompt.generate(texts)
    with pytest.raises(ValueError, match="max_new_tokens"):
        prompt.generate(texts, max_new_tokens=0)


def test_a_file_without_a_template_asks_for_it(summaries, tmp_path):
    model = sp.PromptTuning(length=3, data=summaries)
    model.configure_model()
    path = sp.save_prompt(model, tmp_path / "prompt.safetensors")
    saved = read_prompt(path)
    write_prompt(path, type(saved)(saved.tensors, saved.backbone, saved.method))  # as version 0.1.0 did
    prompt = sp.load_prompt(path, backbone=model.loaded)
    with pytest.raises(ValueError, match="template"):
        prompt.generate("a warm film")
    prompt = sp.load_prompt(path, backbone=model.loaded, template="{soft}{document} it was {target}")
    assert len(prompt.generate("a warm film", max_new_tokens=2)) == 1


@pytest.mark.parametrize(
    "formats",
    [
        {"": "text"},
        {"": {"template": 3}},
        {"": {"template": "{text}"}},
        {"": {"template": TEMPLATE, "decoding": {"max_new_tokens": 0}}},
        {"": {"template": TEMPLATE, "truncation_side": "nowhere"}},
        {"": {"template": TEMPLATE, "decoding": {"class_path": "os.system"}}},
        {"": {"template": TEMPLATE, "more": 1}},
    ],
)
def test_edited_formats_are_refused(formats, data, tmp_path):
    model = sp.PromptTuning(length=3, data=data)
    model.configure_model()
    saved = read_prompt(sp.save_prompt(model, tmp_path / "prompt.safetensors"))
    path = tmp_path / "edited.safetensors"
    write_prompt(path, type(saved)(saved.tensors, saved.backbone, saved.method, formats))
    with pytest.raises(ValueError, match=r"edited.safetensors cannot be loaded"):
        sp.load_prompt(path, backbone=model.loaded)


def test_formats_of_older_files_name_the_truncation_side_cut(data, tmp_path):
    model = sp.PromptTuning(length=3, data=data)
    model.configure_model()
    saved = read_prompt(sp.save_prompt(model, tmp_path / "prompt.safetensors"))
    path = tmp_path / "older.safetensors"
    formats = {"": {"template": TEMPLATE, "cut": "start"}}
    write_prompt(path, type(saved)(saved.tensors, saved.backbone, saved.method, formats))
    prompt = sp.load_prompt(path, backbone=model.loaded)
    assert prompt.method.row_formats[""].truncation_side == "start"


def test_rows_that_lack_columns_are_named(data):
    model = sp.PromptTuning(length=3, data=data)
    model.configure_model()
    prompt = sp.Prompt(model)
    with pytest.raises(ValueError, match="row 1: no column 'text'"):
        prompt.predict(["dull", {"title": "dull"}])
    with pytest.raises(ValueError, match="single task"):
        prompt.predict("dull", task="reviews")


def test_words_are_tagged(spec):
    rows = [{"tokens": ["a", "warm", "film"], "tags": ["O", "A", "N"]}, {"tokens": ["dull"], "tags": ["A"]}] * 4
    data = sp.TaggingDataModule(backbone=spec, train=rows, tags=["O", "A", "N"], cache=False)
    model = sp.PromptTuning(length=2, data=data, readout=sp.TokenHead)
    model.configure_model()
    records = sp.Prompt(model).predict([{"tokens": ["a", "warm", "film"]}, "dull film"])
    assert [len(record["prediction"]) for record in records] == [3, 2]


def test_each_task_has_its_own_rows(data, summaries, tmp_path):
    both = sp.MultitaskDataModule({"mood": data, "sum": summaries}, scores={"sum": "rougeL"})
    model = sp.MPT(length=3, data=both)
    model.configure_model()
    prompt = sp.load_prompt(sp.save_prompt(model, tmp_path / "prompt.safetensors"), backbone=model.loaded)
    assert prompt.tasks == ("mood", "sum")
    assert prompt.predict("dull", task="mood")[0]["prediction"] in LABELS
    assert len(prompt.generate("dull", task="sum", max_new_tokens=2)) == 1
    with pytest.raises(ValueError, match="one of the tasks"):
        prompt.predict("dull")
