"""Classes of a checkpoint fill in for those that a command does not name."""

import pytest

from lightning_softprompt.checkpoints.hyperparameters import to_plain
from lightning_softprompt.core.types import Classes
from lightning_softprompt.data.saved_classes import fill_classes, lacks_classes

OPTIONS = {"Texts": "labels", "Tags": "tags"}
SPOKEN = to_plain(Classes({"a": [" good", " great"], "b": [" bad"]}, "{text} it was {target}"))
UNSPOKEN = to_plain(Classes({"O": (), "B": ()}))


def data(kind, **arguments):
    return {"class_path": kind, "init_args": {"labels": None, "tags": None, **arguments}}


@pytest.mark.parametrize(
    ("config", "filled"),
    [
        (data("Texts"), {"labels": {"a": ["good", "great"], "b": ["bad"]}, "tags": None}),
        (data("Texts", labels=["x", "y"]), {"labels": ["x", "y"], "tags": None}),
        (data("Summaries"), {"labels": None, "tags": None}),
    ],
)
def test_classes_are_filled_in_where_none_are_named(config, filled):
    assert lacks_classes(config, OPTIONS.get) == (config["init_args"] != filled)
    fill_classes(config, {"classes": SPOKEN}, OPTIONS.get)
    assert config["init_args"] == filled


def test_tags_and_the_classes_of_tasks_are_filled_in():
    tasks = {"one": data("Texts"), "two": data("Tags"), "three": data("Texts", labels=["x", "y"])}
    config = {"class_path": "Several", "init_args": {"tasks": tasks}}
    assert lacks_classes(config, OPTIONS.get)
    fill_classes(config, {"classes_by_task": {"one": SPOKEN, "two": UNSPOKEN, "three": SPOKEN}}, OPTIONS.get)
    assert tasks["one"]["init_args"]["labels"] == {"a": ["good", "great"], "b": ["bad"]}
    assert tasks["two"]["init_args"]["tags"] == ["O", "B"]
    assert tasks["three"]["init_args"]["labels"] == ["x", "y"]


@pytest.mark.parametrize("saved", [{}, {"classes": None}, {"classes": "x"}, {"classes": {"words": []}}])
def test_a_file_without_classes_changes_nothing(saved):
    config = data("Texts")
    fill_classes(config, saved, OPTIONS.get)
    assert config == data("Texts")
