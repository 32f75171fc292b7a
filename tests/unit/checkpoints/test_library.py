"""A library of prompts, how alike they are, and what is started from them."""

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
    return sum(a * b for a, b in zip(one, other, strict=True)) / (
        sum(a * a for a in one) ** 0.5 * sum(b * b for b in other) ** 0.5
    )


@pytest.fixture
def kept(backbone, tmp_path):
    """A function that writes soft tokens as a run leaves them."""

    def kept(name, tokens, key="tokens", backbone=backbone):
        path = tmp_path / f"{name}.safetensors"
        method = {"_class_path": "lightning_softprompt.methods.input_prompts.prompt_tuning.PromptTuning"}
        write_prompt(path, SavedPrompt({key: tokens}, backbone_identity(backbone), method))
        return path

    return kept


@pytest.fixture
def filled(kept, tmp_path):
    """A library, its prompts, and the prompt of a task that is most like `b`, less like `a` and unlike `c`."""
    own = torch.randn(LENGTH, WIDTH)
    noise = {name: torch.randn(LENGTH, WIDTH) for name in "abc"}
    tokens = {"a": own + 2 * noise["a"], "b": own + 0.1 * noise["b"], "c": -own + 0.1 * noise["c"]}
    made = Library(tmp_path / "library")
    for name, of in tokens.items():
        made.add(name, kept(name, of))
    return made, tokens, own


def test_similarities_as_loops():
    one, other = torch.randn(3, 5), torch.randn(4, 5)
    pairs = [cosine(a, b) for a in one for b in other]
    assert row_similarity(one, other) == pytest.approx(float(sum(pairs) / 12), abs=1e-6)
    assert mean_similarity(one, other) == pytest.approx(float(cosine(one.mean(0), other.mean(0))), abs=1e-6)
    table = similarities([one, other], "rows")
    assert_close(table, table.T)
    assert table[0, 1] == pytest.approx(row_similarity(one, other))
    assert similarities([one, other], "mean")[1, 1] == pytest.approx(1.0, abs=1e-6)


def test_a_library_keeps_copies_by_name(filled, kept, tmp_path):
    made, tokens, _ = filled
    assert made.names == ["a", "b", "c"]
    for name, saved in made.read().items():
        assert_close(soft_tokens(saved, made.path(name)), tokens[name])
    with pytest.raises(ValueError, match=r"a\.safetensors already exists"):
        made.add("a", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="names may contain only letters"):
        made.add("../a", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="no prompts in"):
        Library(tmp_path / "nowhere").read()
    assert not (tmp_path / "nowhere").exists()


def test_what_has_no_plain_soft_tokens_is_refused_with_the_way_out(backbone, tmp_path):
    made = Library(tmp_path / "library")
    for cls in (ResidualPromptTuning, DePT):
        module = cls(length=LENGTH, backbone=backbone.spec)
        module.attach(backbone)
        path = tmp_path / "other.safetensors"
        write_prompt(path, SavedPrompt(module.state_dict(), backbone_identity(backbone), dict(module.hparams)))
        with pytest.raises(ValueError, match=r"more than soft tokens, .* fold it first"):
            made.add("other", path)
    assert made.names == []


def test_prompts_of_another_backbone_do_not_come_in(filled, kept, load, tmp_path):
    made, *_ = filled
    other = kept("other", torch.randn(LENGTH, WIDTH), backbone=load("llama", seed=1))
    with pytest.raises(ValueError, match="prompts of different backbones cannot be compared"):
        made.add("other", other)
    with pytest.raises(CommandError, match="different backbones"):
        prompts.main(["suggest", str(other), "--folder", str(made.folder)])


def test_shared_and_folded_soft_tokens_are_found(backbone, kept, tmp_path):
    tokens = torch.randn(LENGTH, WIDTH)
    folded = kept("folded", tokens[None], key="parts.tokens")
    assert_close(soft_tokens(read_prompt(folded), folded), tokens)
    module = MPT(length=LENGTH, backbone=backbone.spec, classes_by_task={"a": None, "b": None})
    module.attach(backbone)
    saved = SavedPrompt(module.state_dict(), backbone_identity(backbone), {})
    assert_close(soft_tokens(saved, tmp_path), module.shared.detach())


# Starts


@pytest.mark.parametrize("weights", [None, [0.25, 0.75], [1.0, 1.0], [2.0, -1.0]])
def test_a_start_from_several_prompts_is_their_weighted_sum(backbone, kept, weights):
    one, other = torch.randn(LENGTH, WIDTH), torch.randn(LENGTH, WIDTH)
    paths = [str(kept("one", one)), str(kept("other", other))]
    first, second = weights or (0.5, 0.5)
    assert_close(FromCheckpoints(paths, weights)(backbone, LENGTH), first * one + second * other)


def test_starts_that_do_not_fit_are_refused(backbone, kept, load):
    path = str(kept("one", torch.randn(LENGTH, WIDTH)))
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
def test_a_start_from_the_library_is_the_likest_or_a_mixture_by_likeness(backbone, kept, filled, measure):
    made, tokens, own = filled
    of = {"rows": row_similarity, "mean": mean_similarity}[measure]
    query = str(kept("own", own))
    like = {name: of(own, tokens[name]) for name in tokens}
    assert like["b"] > like["a"] > 0 > like["c"]
    best = FromLibrary(query, str(made.folder), measure=measure)(backbone, LENGTH)
    assert_close(best, tokens["b"])
    for top in (2, 3):  # the third is unlike
        mixture = FromLibrary(query, str(made.folder), top, measure)(backbone, LENGTH)
        expected = (like["b"] * tokens["b"] + like["a"] * tokens["a"]) / (like["a"] + like["b"])
        assert_close(mixture, expected, atol=1e-5, rtol=1e-5)
    unlike = str(kept("unlike", -own - tokens["b"] * 3 - tokens["a"] + tokens["c"] * 9))
    made.path("c").unlink()
    with pytest.raises(ValueError, match="no similar prompt found"):
        FromLibrary(unlike, str(made.folder), measure=measure)(backbone, LENGTH)


def test_methods_start_there(backbone, kept, filled):
    made, tokens, own = filled
    init = FromLibrary(str(kept("own", own)), str(made.folder))
    module = PromptTuning(length=LENGTH, init=init, backbone=backbone.spec)
    module.attach(backbone)
    assert_close(module.tokens.detach(), tokens["b"])
    assert not torch.equal(Uniform()(backbone, LENGTH), tokens["b"])


# The command


def test_the_command_adds_lists_compares_draws_and_suggests(filled, kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # the folders of tests may have long names
    made, tokens, own = filled
    at = ["--folder", str(made.folder)]
    assert prompts.main(["add", "d", str(kept("d", own)), *at]) == 0
    assert "4 prompts" in capsys.readouterr().out
    assert prompts.main(["list", *at]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[2:]] == ["a", "b", "c", "d"]
    assert "PromptTuning" in listed[2]
    assert "3 x 32" in listed[2]
    assert prompts.main(["similar", *at, "--plot", str(tmp_path / "plots" / "map.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[3].split()[4]) == pytest.approx(row_similarity(tokens["b"], own), abs=1e-3)
    assert (tmp_path / "plots" / "map.png").read_bytes().startswith(b"\x89PNG")
    made.path("d").unlink()
    query = str(kept("own", own))
    assert prompts.main(["suggest", query, *at, "--top", "2", "--measure", "mean"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[2:4]] == ["b", "a"]
    assert f"--model.init.path {made.path('b')}" in said
    assert f"query: {query}, folder: {made.folder}, top: 2, measure: mean" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["add", "one"], "add requires NAME and FILE, got"),
        (["list", "one"], "list requires no arguments, got"),
        (["suggest", "x", "--top", "0"], "--top must be at least 1"),
        (["similar"], "no prompts in library"),
        (["add", "one", "nowhere.safetensors"], "no prompt at nowhere"),
    ],
)
def test_mistakes_of_the_command_are_told_in_a_line(words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=named):
        prompts.main(words)
    assert list(tmp_path.iterdir()) == []
