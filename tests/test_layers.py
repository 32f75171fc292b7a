"""Which part of the package may know of which, read from the syntax trees: a wrong import fails here, not in review."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lightning_softprompt"
NAME = "lightning_softprompt"

LOWEST = {"types", "template", "folders", "tensor_files", "word_boundaries"}
BACKBONES = LOWEST | {"backbones"}
SHARED = BACKBONES | {"checkpoints", "prompts", "lm"}
SCORING = SHARED | {"readouts", "objectives", "evaluation"}
WEIGHTS = {"backbones.base", "backbones.load"}
TASKS = LOWEST | WEIGHTS | {"backbones.codec", "backbones.decoding", "evaluation", "retrieval"}

MAY_IMPORT = {  # beside its own kind
    "types": set(),
    "template": {"types"},
    "folders": set(),
    "tensor_files": set(),
    "trust": {"commands"},  # whose errors it raises
    "word_boundaries": set(),
    "backbones": LOWEST,
    "checkpoints": BACKBONES | {"trust"},
    "prompts": BACKBONES | {"checkpoints"},
    "lm": BACKBONES | {"checkpoints"},
    "readouts": SHARED,
    "objectives": SHARED,
    "evaluation": SHARED,
    "retrieval": LOWEST | WEIGHTS,  # what is searched is given to it: it reads no corpus
    "optimizers": set(),
    "module": SCORING | {"optimizers"},
    "methods": SCORING | {"module"},
    "data": TASKS,
}
MAY_IMPORT_DATA = {"data", "cli", "commands", "run_config", "session", "quickstart", "rag_quickstart"}
BAD_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}


@cache
def tree(path):
    return ast.parse(path.read_text())


def files(part=""):
    place = ROOT / part
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """Modules of the package that a file imports, anywhere in it, without the package's name."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" if node.module == NAME else str(node.module) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix(f"{NAME}.") for name in names if name.startswith(f"{NAME}.")}
    return found


def within(name, allowed):
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def classes():
    """Every class of the package with the names of its bases."""
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                yield path, node.name, {ast.unparse(base).rpartition(".")[2] for base in node.bases}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_knows_only_the_parts_below_it(part):
    assert files(part)
    for path in files(part):
        wrong = {name for name in imports(path) if not within(name, MAY_IMPORT[part] | {part})}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_nobody_but_the_command_line_knows_the_data():
    for path in files():
        if part_of(path) not in MAY_IMPORT_DATA:
            assert not [n for n in imports(path) if within(n, {"data"})], path.relative_to(ROOT)


def test_callbacks_know_no_method():
    for path in files("callbacks"):
        assert not [n for n in imports(path) if within(n, {"methods"})], path.name


def test_methods_do_not_know_each_other():
    for path in files("methods"):
        if path.name != "__init__.py":
            assert not [n for n in imports(path) if within(n, {"methods"})], path.name


def test_no_method_subclasses_another():
    bases = {name: told for path, name, told in classes() if part_of(path) == "methods"}
    assert bases
    for name, told in bases.items():
        assert not told & bases.keys(), f"{name} subclasses {told & bases.keys()}"


def test_nobody_asks_which_method_it_is():
    methods = {name for path, name, _ in classes() if part_of(path) == "methods"}
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                asked |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
                assert not asked & methods, f"{path.relative_to(ROOT)}:{node.lineno} asks for {asked & methods}"


def test_every_file_has_a_name_that_says_what_is_in_it():
    named = {part for path in files() for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not named & BAD_NAMES
    assert not [name for _, name, _ in classes() if name.lower().endswith(("helper", "manager", "util", "utils"))]
