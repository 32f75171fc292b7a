"""A library of prompts, the similarity of prompts, and initialization from them."""

import pytest
import torch
from torch.testing import assert_close

from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.library import Library, soft_tokens
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt, write_prompt
from lightning_softprompt.cli.commands import prompts
from lightning_softprompt.methods import MPT, DePT, PromptTuning, ResidualPromptTuning
from lightning_softprompt.prompts.from_checkpoints import FromCheckpoints, FromLibrary
from lightning_softprompt.prompts.init import Uniform
from lightning_softprompt.prompts.similarity import mean_similarity, row_similarity, similarities
from lightning_softprompt.system.errors import CommandError

FAMILIES = ("llama",)
LENGTH, WIDTH = 3, 32


def cosine(one, other):
    product = sum(a * b for a, b in zip(one, other, strict=True))
    one_norm = sum(a * a for a in one) ** 0.5
    other_norm = sum(b * b for b in other) ** 0.5
    return product / (one_norm * other_norm)


@pytest.fixture
def save_tokens(backbone, tmp_path):
    """A function that writes soft tokens as a run does."""

    def save_tokens(name, tokens, key="tokens", backbone=backbone):
        path = tmp_path / f"{name}.safetensors"
        method = {"_class_path": "lightning_softprompt.methods.input_prompts.prompt_tuning.PromptTuning"}
        write_prompt(path, SavedPrompt({key: tokens}, backbone_identity(backbone), method))
        return path

    return save_tokens


@pytest.fixture
def example_library(save_tokens, tmp_path):
    """A library, its prompts, and the prompt of a task that is most similar to `b`, less to `a` and opposite to `c`."""
    query = torch.randn(LENGTH, WIDTH)
    tokens = {
        "a": query + 2 * torch.randn(LENGTH, WIDTH),
        "b": query + 0.1 * torch.randn(LENGTH, WIDTH),
        "c": -query + 0.1 * torch.randn(LENGTH, WIDTH),
    }
    library = Library(tmp_path / "library")
    for name, values in tokens.items():
        library.add(name, save_tokens(name, values))
    return library, tokens, query


def test_similarities_equal_loops_over_pairs_of_rows():
    one, other = torch.randn(3, 5), torch.randn(4, 5)
    pairs = [cosine(a, b) for a in one for b in other]
    assert row_similarity(one, other) == pytest.approx(float(sum(pairs) / 12), abs=1e-6)
    assert mean_similarity(one, other) == pytest.approx(float(cosine(one.mean(0), other.mean(0))), abs=1e-6)
    table = similarities([one, other], "rows")
    assert_close(table, table.T)
    assert table[0, 1] == pytest.approx(row_similarity(one, other))
    assert similarities([one, other], "mean")[1, 1] == pytest.approx(1.0, abs=1e-6)


def test_a_library_stores_copies_by_name(example_library, save_tokens, tmp_path):
    library, tokens, _ = example_library
    assert library.names == ["a", "b", "c"]
    for name, saved in library.read().items():
        assert_close(soft_tokens(saved, library.path(name)), tokens[name])
    with pytest.raises(ValueError, match=r"a\.safetensors already exists"):
        library.add("a", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="names may contain only letters"):
        library.add("../a", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="no prompts in"):
        Library(tmp_path / "nowhere").read()
    assert not (tmp_path / "nowhere").exists()


def test_a_prompt_that_is_more_than_soft_tokens_is_rejected_with_advice(backbone, tmp_path):
    library = Library(tmp_path / "library")
    for cls in (ResidualPromptTuning, DePT):
        module = cls(length=LENGTH, backbone=backbone.spec)
        module.attach(backbone)
        path = tmp_path / "other.safetensors"
        write_prompt(path, SavedPrompt(module.state_dict(), backbone_identity(backbone), dict(module.hparams)))
        with pytest.raises(ValueError, match=r"more than soft tokens, .* fold it first"):
            library.add("other", path)
    assert library.names == []


def test_prompts_of_another_backbone_are_rejected(example_library, save_tokens, load, tmp_path):
    library, *_ = example_library
    other = save_tokens("other", torch.randn(LENGTH, WIDTH), backbone=load("llama", seed=1))
    with pytest.raises(ValueError, match="prompts of different backbones cannot be compared"):
        library.add("other", other)
    with pytest.raises(CommandError, match="different backbones"):
        prompts.main(["suggest", str(other), "--folder", str(library.folder)])


def test_shared_and_folded_soft_tokens_are_found(backbone, save_tokens, tmp_path):
    tokens = torch.randn(LENGTH, WIDTH)
    folded = save_tokens("folded", tokens[None], key="parts.tokens")
    assert_close(soft_tokens(read_prompt(folded), folded), tokens)
    module = MPT(length=LENGTH, backbone=backbone.spec, classes_by_task={"a": None, "b": None})
    module.attach(backbone)
    saved = SavedPrompt(module.state_dict(), backbone_identity(backbone), {})
    assert_close(soft_tokens(saved, tmp_path), module.shared.detach())


# Initialization


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [2.0, -1.0]])
def test_initialization_from_several_prompts_is_their_weighted_sum(backbone, save_tokens, weights):
    one, other = torch.randn(LENGTH, WIDTH), torch.randn(LENGTH, WIDTH)
    paths = [str(save_tokens("one", one)), str(save_tokens("other", other))]
    first, second = weights or (0.5, 0.5)
    assert_close(FromCheckpoints(paths, weights)(backbone, LENGTH), first * one + second * other)


def test_initialization_from_prompts_that_do_not_fit_is_rejected(backbone, save_tokens, load):
    path = str(save_tokens("one", torch.randn(LENGTH, WIDTH)))
    with pytest.raises(ValueError, match="paths and as many weights"):
        FromCheckpoints([path], [1.0, 2.0])
    with pytest.raises(ValueError, match="set length to 3"):
        FromCheckpoints([path])(backbone, 4)
    with pytest.raises(ValueError, match="was trained on"):
        FromCheckpoints([path])(load("llama", seed=1), LENGTH)
    with pytest.raises(ValueError, match="no soft tokens in nothing"):
        FromCheckpoints([path], name="nothing")(backbone, LENGTH)
    with pytest.raises(ValueError, match="top must be at least 1"):
        FromLibrary(path, top=0)


@pytest.mark.parametrize("measure", ["rows", "mean"])
def test_initialization_from_the_library_takes_similar_prompts(backbone, save_tokens, example_library, measure):
    library, tokens, query = example_library
    similarity = {"rows": row_similarity, "mean": mean_similarity}[measure]
    path = str(save_tokens("query", query))
    likeness = {name: similarity(query, tokens[name]) for name in tokens}
    assert likeness["b"] > likeness["a"] > 0 > likeness["c"]
    best = FromLibrary(path, str(library.folder), measure=measure)(backbone, LENGTH)
    assert_close(best, tokens["b"])
    weighted_sum = likeness["b"] * tokens["b"] + likeness["a"] * tokens["a"]
    expected = weighted_sum / (likeness["a"] + likeness["b"])
    for top in (2, 3):  # the third prompt has a negative similarity and adds nothing
        mixture = FromLibrary(path, str(library.folder), top, measure)(backbone, LENGTH)
        assert_close(mixture, expected, atol=1e-5, rtol=1e-5)
    opposite = -query - tokens["b"] * 3 - tokens["a"] + tokens["c"] * 9
    opposite_path = str(save_tokens("opposite", opposite))
    library.path("c").unlink()
    with pytest.raises(ValueError, match="no similar prompt found"):
        FromLibrary(opposite_path, str(library.folder), measure=measure)(backbone, LENGTH)


def test_a_method_is_initialized_from_the_library(backbone, save_tokens, example_library):
    library, tokens, query = example_library
    init = FromLibrary(str(save_tokens("query", query)), str(library.folder))
    module = PromptTuning(length=LENGTH, init=init, backbone=backbone.spec)
    module.attach(backbone)
    assert_close(module.tokens.detach(), tokens["b"])
    assert not torch.equal(Uniform()(backbone, LENGTH), tokens["b"])


# The command


def test_the_command_adds_lists_compares_and_suggests(example_library, save_tokens, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # folders of tests can have long names
    library, tokens, query = example_library
    folder_option = ["--folder", str(library.folder)]
    assert prompts.main(["add", "d", str(save_tokens("d", query)), *folder_option]) == 0
    assert "4 prompts" in capsys.readouterr().out
    assert prompts.main(["list", *folder_option]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[2:]] == ["a", "b", "c", "d"]
    assert "PromptTuning" in listed[2]
    assert "3 x 32" in listed[2]
    assert prompts.main(["similar", *folder_option, "--plot", str(tmp_path / "plots" / "map.png")]) == 0
    output = capsys.readouterr().out
    assert "similarity with itself is below 1" in output
    lines = output.splitlines()
    assert float(lines[3].split()[4]) == pytest.approx(row_similarity(tokens["b"], query), abs=1e-3)
    assert (tmp_path / "plots" / "map.png").read_bytes().startswith(b"\x89PNG")
    assert prompts.main(["similar", *folder_option, "--measure", "mean"]) == 0
    output = capsys.readouterr().out
    assert "with itself" not in output
    assert [line.split()[number] for number, line in enumerate(output.splitlines()[2:], 1)] == ["1.000"] * 4
    library.path("d").unlink()
    path = str(save_tokens("query", query))
    assert prompts.main(["suggest", path, *folder_option, "--top", "2", "--measure", "mean"]) == 0
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines()[2:4]] == ["b", "a"]
    assert f"--model.init.path {library.path('b')}" in output
    assert f"query: {path}, folder: {library.folder}, top: 2, measure: mean" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "one"], "add requires NAME and FILE, got"),
        (["list", "one"], "list requires no arguments, got"),
        (["suggest", "x", "--top", "0"], "--top must be at least 1"),
        (["similar"], "no prompts in library"),
        (["add", "one", "nowhere.safetensors"], "no prompt at nowhere"),
    ],
)
def test_the_command_reports_a_mistake_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=message):
        prompts.main(words)
    assert list(tmp_path.iterdir()) == []
