"""The classes of a checkpoint replace classes that a command does not set."""

import pytest

from lightning_softprompt.checkpoints.hyperparameters import to_plain
from lightning_softprompt.core.types import Classes
from lightning_softprompt.data.saved_classes import fill_classes, lacks_classes

OPTIONS = {"Texts": "labels", "Tags": "tags"}
WITH_WORDS = to_plain(Classes({"a": [" good", " great"], "b": [" bad"]}, "{text} it was {target}"))
WITHOUT_WORDS = to_plain(Classes({"O": (), "B": ()}))


def data_config(class_path, **arguments):
    return {"class_path": class_path, "init_args": {"labels": None, "tags": None, **arguments}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (data_config("Texts"), {"labels": {"a": ["good", "great"], "b": ["bad"]}, "tags": None}),
        (data_config("Texts", labels=["x", "y"]), {"labels": ["x", "y"], "tags": None}),
        (data_config("Summaries"), {"labels": None, "tags": None}),
    ],
)
def test_saved_classes_are_used_only_if_the_config_sets_none(config, expected):
    assert lacks_classes(config, OPTIONS.get) == (config["init_args"] != expected)
    fill_classes(config, {"classes": WITH_WORDS}, OPTIONS.get)
    assert config["init_args"] == expected


def test_saved_tags_and_classes_are_used_for_each_task():
    tasks = {"one": data_config("Texts"), "two": data_config("Tags"), "three": data_config("Texts", labels=["x", "y"])}
    config = {"class_path": "Several", "init_args": {"tasks": tasks}}
    assert lacks_classes(config, OPTIONS.get)
    fill_classes(
        config, {"classes_by_task": {"one": WITH_WORDS, "two": WITHOUT_WORDS, "three": WITH_WORDS}}, OPTIONS.get
    )
    assert tasks["one"]["init_args"]["labels"] == {"a": ["good", "great"], "b": ["bad"]}
    assert tasks["two"]["init_args"]["tags"] == ["O", "B"]
    assert tasks["three"]["init_args"]["labels"] == ["x", "y"]


@pytest.mark.parametrize("saved", [{}, {"classes": None}, {"classes": "x"}, {"classes": {"words": []}}])
def test_a_file_without_classes_leaves_the_config_unchanged(saved):
    config = data_config("Texts")
    fill_classes(config, saved, OPTIONS.get)
    assert config == data_config("Texts")
