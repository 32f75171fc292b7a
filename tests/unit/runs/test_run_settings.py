"""Settings that a resumed run compares, and settings that it does not."""

import pytest

from lightning_softprompt.callbacks.recovery.run_settings import refuse_other_processes
from lightning_softprompt.checkpoints.run_settings import refuse_changes, refuse_incomplete
from lightning_softprompt.runs.run_settings import config_settings
from lightning_softprompt.runs.run_spec import RunSpec

CONFIG = {
    "data": {
        "class_path": "x.MultitaskDataModule",
        "init_args": {
            "tasks": {
                "sst2": {
                    "class_path": "x.Classification",
                    "init_args": {"path": "a", "labels": {"no": "bad", "yes": "good"}},
                },
            },
            "sampling": {"class_path": "x.Temperature", "init_args": {"temperature": 2.0}},
            "num_workers": 0,
            "retriever": {"index": "indexes/mine", "mode": "lexical"},
        },
    },
    "backbone": {"name": "x", "dtype": "float32", "linear_backend": "auto"},
    "trainer": {
        "precision": None, "accumulate_grad_batches": 1, "max_epochs": 2,
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}],
    },
    "replicas": 1,
}  # fmt: skip
COMPLETE = {"epoch": 1, "global_step": 1, "state_dict": {}, "lr_schedulers": []}
COMPLETE |= {"loops": {"fit_loop": 1}, "callbacks": {"RngState": 1}, "optimizer_states": [1]}


def with_value(config, path, value):
    """Return the config with another value at a path."""
    name, _, rest = path.partition("/")
    if rest:
        value = with_value(config.get(name, {}), rest, value)
    return {**config, name: value}


def compare(path, value, accepted=()):
    current = config_settings(with_value(CONFIG, path, value))
    refuse_changes(config_settings(CONFIG), current, accepted, "last.ckpt")


TASK = "data/init_args/tasks/sst2/init_args"


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (f"{TASK}/labels", {"no": "good", "yes": "bad"}, "data.tasks.sst2.labels"),
        (f"{TASK}/labels", {"yes": "good", "no": "bad"}, "data.tasks.sst2.labels"),
        ("data/init_args/sampling/init_args/temperature", 1.0, "data.sampling.temperature"),
        ("data/class_path", "x.Other", "data.class_path"),
        ("data/init_args/retriever/mode", "dense", "data.retriever.mode"),
        ("backbone/dtype", "bfloat16", "backbone.dtype"),
        ("trainer/precision", "bf16-mixed", "trainer.precision"),
        ("trainer/accumulate_grad_batches", 2, "trainer.accumulate_grad_batches"),
        ("trainer/gradient_clip_val", 0.1, "trainer.gradient_clip_val"),
        ("trainer/limit_train_batches", 1, "trainer.limit_train_batches"),
        ("trainer/val_check_interval", 0.5, "trainer.val_check_interval"),
        ("trainer/deterministic", True, "trainer.deterministic"),
        ("trainer/callbacks", [{"class_path": "x.EarlyStopping"}], "trainer.callbacks"),
        ("replicas", {"seeds": [1, 2]}, "replicas.seeds"),
    ],
)
def test_a_setting_that_changes_training_is_refused_by_name_unless_accepted(path, value, name):
    with pytest.raises(ValueError, match=rf"{name} was .* and is .* --run\.accept_changes {name}"):
        compare(path, value)
    compare(path, value, [name])
    compare(path, value, [name.split(".")[0]])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{TASK}/path", "moved"),
        ("data/init_args/num_workers", 2),
        ("data/init_args/retriever/index", "moved"),
        ("backbone/name", "moved"),
        ("trainer/precision", 32),
        ("trainer/max_epochs", 9),
        ("trainer/max_steps", 9),
        ("trainer/gradient_clip_algorithm", "value"),
        ("trainer/limit_train_batches", 1.0),
        ("trainer/callbacks", None),
        ("trainer/callbacks", [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]),
        ("trainer/logger", True),
        ("replicas", {"count": 1}),
        (f"{TASK}/an_option_of_a_later_version", 1),
    ],
)
def test_a_setting_that_does_not_change_training_is_not_compared(path, value):
    compare(path, value)


def test_accepted_names_are_a_list_or_a_text():
    assert RunSpec(accept_changes="data.labels, train_rows").accepted_changes == ["data.labels", "train_rows"]
    assert RunSpec(accept_changes=["a"]).accepted_changes == ["a"]
    assert RunSpec().accepted_changes == []


@pytest.mark.parametrize("name", COMPLETE)
def test_a_checkpoint_that_lacks_progress_is_not_resumed(name):
    refuse_incomplete(COMPLETE, "last.ckpt")
    with pytest.raises(ValueError, match=rf"last.ckpt lacks {name}, .* --init_from last.ckpt"):
        refuse_incomplete({key: value for key, value in COMPLETE.items() if key != name}, "last.ckpt")


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({"loops": {}}, "loops"),
        ({"callbacks": {"Other": 1}}, r"callbacks\.RngState"),
        ({"optimizer_states": []}, "opt"),
        ({"settings": {}}, "settings"),
        ({"loops": {"fit_loop": {"x": 1}}}, r"loops\.fit_loop\.state_dict"),
    ],
)
def test_a_checkpoint_with_empty_progress_is_not_resumed(change, lacks):
    with pytest.raises(ValueError, match=f"lacks {lacks}"):
        refuse_incomplete({**COMPLETE, **change}, "last.ckpt")


@pytest.mark.parametrize(
    "change",
    [
        {"loops": "x"},
        {"callbacks": [1]},
        {"backbone": "x"},
        {"hyper_parameters": [1]},
        {"settings": [1]},
        {"epoch": ""},
    ],
)
def test_a_checkpoint_with_progress_of_another_type_is_not_resumed(change):
    with pytest.raises(ValueError, match=f"last.ckpt cannot be resumed: .* {next(iter(change))} are of another type"):
        refuse_incomplete({**COMPLETE, **change}, "last.ckpt")


def test_processes_with_other_data_are_named():
    one = {"train_rows": "9 rows (a)", "seed_everything": 1}
    refuse_other_processes([one, dict(one)])
    with pytest.raises(ValueError, match=r"train_rows is '9 rows \(a\)' in process 0 and '8 rows \(b\)' in process 2"):
        refuse_other_processes([one, one, {**one, "train_rows": "8 rows (b)"}])
