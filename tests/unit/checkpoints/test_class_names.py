"""A trained readout goes with the classes that it was trained for, in their order; label words go with any."""

import pytest

from lightning_softprompt.checkpoints.class_names import check_class_names, refuse_other_classes


def method(*names, **tasks):
    made = {"class_path": "Classes", "init_args": {"words": {name: ["w"] for name in names}}}
    by_task = {task: method(*own)["classes"] for task, own in tasks.items()}
    return {"classes": made if names else None, "classes_by_task": by_task or None}


@pytest.mark.parametrize("name", ["readout.linear.weight", "replicas.1.readout.linear.weight"])
def test_order_and_names_count_where_something_is_trained_for_each_class(name):
    check_class_names(method("a", "b"), [name, "tokens"], method("a", "b"), "p")
    check_class_names(method("a", "b"), ["tokens"], method("b", "a"), "p")
    check_class_names(method(), [name], method("b", "a"), "p")
    for other in (("b", "a"), ("a", "c"), ("a", "b", "c")):
        with pytest.raises(ValueError, match="p has a readout with weights for the classes"):
            check_class_names(method("a", "b"), [name], method(*other), "p")


def test_each_task_has_its_own_classes():
    names = ["readout.of_tasks.one.linear.weight"]
    check_class_names(method(one="ab", two="ab"), names, method(two="ba", one="ab"), "p")
    with pytest.raises(ValueError, match=r"--data\.tasks\.one\.labels"):
        check_class_names(method(one="ab"), names, method(one="ba"), "p")


def test_classes_that_are_not_known_go_with_any():
    refuse_other_classes(None, ["a"], "p")
    refuse_other_classes(["a"], None, "p")
