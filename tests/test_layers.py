"""Checks which part of the package imports which, from the syntax trees."""

import ast
import subprocess
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from shutil import which

import pytest

ROOT = Path(__file__).parents[1] / "lightning_softprompt"
NAME = "lightning_softprompt"

GROUND = {"core", "system"}
STORED = GROUND | {"backbones", "checkpoints"}
TRAINED = STORED | {"prompts", "readouts", "objectives", "evaluation", "distributed"}

MAY_IMPORT = {  # in addition to itself
    "core": set(),
    "system": set(),
    "constraints": GROUND,
    "backbones": GROUND,
    "distributed": GROUND | {"backbones"},
    "checkpoints": GROUND | {"backbones", "moved", "renamed_options"},
    "runs": STORED,
    "evaluation": GROUND | {"backbones", "checkpoints", "constraints"},
    "retrieval": GROUND | {"backbones"},  # its callers pass the documents, so it reads no corpus
    "prompts": STORED | {"vocabulary"},  # texts for the rows of new tokens
    "objectives": STORED | {"distributed", "rewards"},
    "rewards": STORED | {"constraints", "evaluation"},
    "reports": GROUND | {"evaluation"},
    "analysis": STORED | {"evaluation", "reports"},
    "studies": STORED,
    "data": STORED | {"constraints", "evaluation", "retrieval", "rewards"},
    "vocabulary": GROUND | {"backbones", "data"},
    "readouts": STORED | {"prompts"},
    "methods": TRAINED | {"runs"},
    "rag": STORED | {"data", "evaluation", "methods", "retrieval"},
    "callbacks": STORED | {"data", "distributed", "evaluation", "methods", "objectives", "reports", "runs"},
    "inference": TRAINED | {"methods", "data"},
    "synthetic": TRAINED | {"data", "inference", "methods", "retrieval"},
    "interchange": TRAINED | {"methods", "inference", "reports"},
    "serving": TRAINED | {"methods", "inference"},
    "training": TRAINED | {"methods", "runs", "callbacks", "data", "reports"},
    "cli": TRAINED
    | {
        "constraints",
        "methods",
        "runs",
        "callbacks",
        "data",
        "rag",
        "reports",
        "retrieval",
        "studies",
        "synthetic",
        "training",
        "analysis",
        "vocabulary",
        "inference",
        "interchange",
        "serving",
    }
    | {"moved", "renamed_options"},
}
BAD_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}
MOST_MODULES = 16  # of a folder without sub-folders


@cache
def tree(path):
    return ast.parse(path.read_text())


def files(part=""):
    return sorted((ROOT / part).rglob("*.py"))


def module_name(path):
    """Returns the dotted name of the module of a file, without the name of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in files()}


def imports(path):
    """Returns the modules of the package that a file imports at any level, without the name of the package."""
    imported = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        inside = [name.removeprefix(f"{NAME}.") for name in names if name.startswith(f"{NAME}.")]
        imported |= {name if name in MODULES else name.rpartition(".")[0] for name in inside}
    return imported - {"", module_name(path)}


def within(name, part):
    return name == part or name.startswith(f"{part}.")


def classes():
    """Returns every class of the package with the names of its bases."""
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                yield path, node.name, {ast.unparse(base).rpartition(".")[2] for base in node.bases}


def method_files():
    """Returns the files in the sub-folders of `methods`."""
    return [path for path in files("methods") if path.parent.name != "methods"]


def circle(graph):
    """Returns the members of a circle, or an empty result."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_part_has_a_row():
    parts = {path.relative_to(ROOT).parts[0] for path in files() if path.parent != ROOT}
    assert parts == MAY_IMPORT.keys()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_the_parts_below_it(part):
    for path in files(part):
        wrong = {name for name in imports(path) if name.partition(".")[0] not in MAY_IMPORT[part] | {part}}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_parts_do_not_import_each_other_in_a_circle():
    assert not circle(MAY_IMPORT)


def test_files_do_not_import_each_other_in_a_circle():
    assert not circle({name: imports(path) for name, path in MODULES.items()})


def test_the_root_holds_what_every_command_needs():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "moved.py", "renamed_options.py"}


def test_every_folder_is_a_package():
    assert not [str(path) for path in files() if not (path.parent / "__init__.py").is_file()]


@pytest.mark.skipif(which("git") is None, reason="the rules are git's")
def test_the_wheel_has_every_file():
    """The build omits files that `.gitignore` names."""
    paths = [str(path) for path in files()]
    command = ["git", "check-ignore", "--no-index", *paths]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout == ""


def test_folders_are_small():
    folders = defaultdict(list)
    for path in files():
        folders[path.parent].append(path.name)
    large = [str(folder.relative_to(ROOT)) for folder, names in folders.items() if len(names) > MOST_MODULES]
    assert not large


def test_callbacks_know_no_method():
    for path in files("callbacks"):
        assert not [name for name in imports(path) if within(name, "methods") and MODULES[name] in method_files()]


def test_methods_do_not_know_each_other():
    for path in method_files():
        known = [name for name in imports(path) if MODULES[name] in method_files()]
        assert path.name == "__init__.py" or not known, path.name


def test_no_method_subclasses_another():
    bases = {name: parents for path, name, parents in classes() if path in method_files()}
    assert bases
    for name, parents in bases.items():
        assert not parents & bases.keys(), f"{name} subclasses {parents & bases.keys()}"


def test_nobody_asks_which_method_it_is():
    methods = {name for path, name, _ in classes() if path in method_files()}
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                asked |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
                assert not asked & methods, f"{path.relative_to(ROOT)}:{node.lineno} asks for {asked & methods}"


def test_every_file_has_a_name_that_describes_it():
    names = {part for path in files() for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & BAD_NAMES
    assert not [name for _, name, _ in classes() if name.lower().endswith(("helper", "manager", "util", "utils"))]
