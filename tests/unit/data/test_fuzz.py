"""Files with any content are read correctly or rejected with a clear error; nothing is executed or written."""

import json
from pathlib import Path
from string import Formatter

import pytest
import yaml
from hostile import VALUES, fuzz, nothing_happens
from hypothesis import given
from hypothesis import strategies as st

from lightning_softprompt.cli.app import make_cli
from lightning_softprompt.core.template import Template
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.readers.sources import DataError, read_rows
from lightning_softprompt.data.summarization import SummarizationDataModule
from lightning_softprompt.rag.passage_selection import PassageSettings
from lightning_softprompt.rag.qa_datamodule import RagQaDataModule

FAMILIES = ("llama",)
TEMPLATES = st.lists(
    st.sampled_from(["{soft}", "{target}", "{text}", "{a_b}", "{", "}", "{{", "}}", "{0}", "{}", "{text!r}",
                     "{text:>9}", "{text.x}", "{text[0]}", "{Review Text}", "{a-b}", "{ a}", "{'a'}",
                     " ", "\n", "it ", "\0", "é", "{soft", "text}"]), max_size=7,
).map("".join)  # fmt: skip


@fuzz(150)
@given(TEMPLATES | st.text(alphabet="{}![]:. \nasoftrge", max_size=20), st.text(max_size=8), st.text(max_size=8))
def test_a_template_is_formatted_as_by_python_or_rejected(text, column, target):
    try:
        template = Template(text)
    except ValueError as error:
        assert repr(text) in str(error)  # noqa: PT017
        return
    fields = dict.fromkeys(template.columns, column)
    formatted = "".join(part for _, part in template.parts(fields, target))
    values = {**fields, "soft": "", "target": target, None: ""}
    pieces = [literal + values[name] for literal, name, *_ in Formatter().parse(text)]
    assert formatted == "".join(pieces)


COLUMNS = st.sampled_from(["text", "label", "document", "summary", "references", "question", "answers", "positive_ids"])
LABELS = {"negative": "bad", "positive": "good"}


@pytest.fixture
def modules(tiny_folder, load):
    spec = load("llama").spec
    return {
        "classes": ClassificationDataModule("{soft}{text} {target}", LABELS, backbone=spec, cache=False),
        "summaries": SummarizationDataModule(max_target_tokens=4, backbone=spec, cache=False),
        "questions": RagQaDataModule(
            passages=PassageSettings(mode="closed_book"),
            backbone=spec,
            template="{soft}{question} {target}",
            cache=False,
        ),
    }


@pytest.mark.parametrize("kind", ["classes", "summaries", "questions"])
def test_a_row_is_encoded_or_rejected_with_its_number(modules, kind):
    data = modules[kind]

    @fuzz(120)
    @given(st.dictionaries(COLUMNS, VALUES, max_size=8), st.booleans())
    def check(row, labelled):
        split = "train" if labelled else "predict"
        data.sources[split] = [row]
        data._row_source.clear()
        data._prepared.clear()
        try:
            prepared = data.split(split)
        except ValueError as error:
            assert "row 0 of the given rows" in str(error) or "has no rows" in str(error)  # noqa: PT017
        else:
            assert len(prepared) == 1
            assert prepared.lengths[0] <= data.max_tokens

    check()


LINES = st.lists(
    st.binary(max_size=12) | VALUES.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(COLUMNS, VALUES, max_size=3).map(lambda row: json.dumps(row).encode()), max_size=5,
).map(b"\n".join)  # fmt: skip


@fuzz(200)
@given(content=LINES, suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))
def test_a_file_of_any_bytes_is_read_or_rejected_with_its_path(tmp_path, content, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with nothing_happens():
        for action in ("raise", "skip"):
            try:
                rows = read_rows(path, on_bad_row=action)
            except DataError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                assert all(isinstance(row, dict) for row in rows)
                assert suffix != ".jsonl" or list(map(repr, rows)) == list(map(repr, parse_objects(content)))


def parse_objects(content):
    """Yields the lines that are JSON objects of valid characters, as the library `json` reads them."""
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            row = json.loads(line.strip().decode())
            json.dumps(row, ensure_ascii=False).encode()
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


SETTINGS = {
    "model": {"class_path": "PromptTuning", "init_args": {"length": 3}},
    "data": {
        "class_path": "ClassificationDataModule",
        "init_args": {"template": "{soft}{text} {target}", "labels": LABELS, "batch_size": 2},
    },
    "trainer": {"max_steps": 2, "accelerator": "cpu"},
    "run": {"wandb": "disabled"},
}
JUNK = VALUES | st.sampled_from(
    ["../x", "os.system", {"class_path": "os.mkdir", "init_args": {"path": "made"}}, "-", 0]
)
TAGS = st.sampled_from(
    ["", "!!python/object/apply:os.mkdir ['made']", "!!python/name:os.system", "&a [*a]", "{", "\t- x"]
)


def test_a_config_with_any_content_starts_a_run_or_causes_a_short_error(tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "config.yaml", "--backbone.name", str(tiny_folder("llama"))]
    Path("config.yaml").write_text(yaml.safe_dump(SETTINGS))
    make_cli(arguments, run=False)  # imports and caches before the file system is watched
    options = [(group, name) for group in SETTINGS for name in (*SETTINGS[group], "no_such", "init_args")]

    @fuzz(30)
    @given(st.sampled_from(options), JUNK, TAGS, st.booleans())
    def check(option, junk, tag, in_init_args):
        config = json.loads(json.dumps(SETTINGS))
        group, name = option
        settings = config[group].get("init_args", config[group]) if in_init_args else config[group]
        settings[name] = junk
        seed = f"seed_everything: {tag}\n" if tag else ""
        Path("config.yaml").write_text(yaml.safe_dump(config) + seed)
        capsys.readouterr()
        with nothing_happens():
            try:
                cli = make_cli(arguments, run=False)
            except SystemExit as error:
                assert error.code == 2  # noqa: PT017
                assert 1 <= len(capsys.readouterr().err.splitlines()) <= 3
            except ValueError as error:
                assert str(error)  # noqa: PT017
            else:
                assert cli.model.spec == cli.datamodule.spec

    check()
