"""A trained readout requires the classes of its training in their order; label words accept any classes."""

import pytest

from lightning_softprompt.checkpoints.class_names import check_class_names, refuse_other_classes


def method(*names, **tasks):
    classes = {"class_path": "Classes", "init_args": {"words": {name: ["w"] for name in names}}}
    by_task = {task: method(*task_names)["classes"] for task, task_names in tasks.items()}
    return {"classes": classes if names else None, "classes_by_task": by_task or None}


@pytest.mark.parametrize("name", ["readout.linear.weight", "replicas.1.readout.linear.weight"])
def test_a_trained_readout_requires_the_same_classes_in_the_same_order(name):
    check_class_names(method("a", "b"), [name, "tokens"], method("a", "b"), "p")
    check_class_names(method("a", "b"), ["tokens"], method("b", "a"), "p")
    check_class_names(method(), [name], method("b", "a"), "p")
    for other in (("b", "a"), ("a", "c"), ("a", "b", "c")):
        with pytest.raises(ValueError, match="p has a readout with weights for the classes"):
            check_class_names(method("a", "b"), [name], method(*other), "p")


def test_the_classes_of_each_task_are_compared():
    names = ["readout.of_tasks.one.linear.weight"]
    check_class_names(method(one="ab", two="ab"), names, method(two="ba", one="ab"), "p")
    with pytest.raises(ValueError, match=r"--data\.tasks\.one\.labels"):
        check_class_names(method(one="ab"), names, method(one="ba"), "p")


def test_unknown_classes_are_compatible_with_any_classes():
    refuse_other_classes(None, ["a"], "p")
    refuse_other_classes(["a"], None, "p")
