"""Rows of text that are answered by text."""

import pytest

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.data.summarization import SummarizationDataModule
from lightning_softprompt.evaluation.map_reduce import MapReduce

FAMILIES = ("llama", "t5")
ROW = {"document": "it is a sad story about a dog that never ends well", "summary": "a sad dog story"}


@pytest.fixture
def data(family, tiny_folder):
    def data(rows, **options):
        options = {"template": "{soft}{document} : {target}", "max_tokens": 24, "max_target_tokens": 8, **options}
        spec = BackboneSpec(name=str(tiny_folder(family)))
        splits = dict.fromkeys(("train", "validation", "test", "predict"), rows)
        return SummarizationDataModule(backbone=spec, cache=False, **splits, **options)

    return data


def test_a_row_knows_all_its_right_answers(data):
    rows = [ROW, {**ROW, "references": ["a sad dog story", "a dog story", " "]}, {**ROW, "references": None}]
    examples = data(rows).split("train").examples
    assert [e.references for e in examples] == [
        (ROW["summary"],),
        ("a sad dog story", "a dog story"),
        (ROW["summary"],),
    ]
    batch = next(iter(data(rows).test_dataloader()))
    assert {example.target for example in batch.examples} == {"a sad dog story"}


def test_targets_end_with_the_token_that_stops(data):
    split = data([ROW])
    assert split.split("train").encoded[0].targets[-1:] == split.codec.stop


@pytest.mark.parametrize("side", ["end", "start", "middle"])
def test_what_is_read_does_not_depend_on_what_is_to_be_said(data, side):
    """Or the length of the right answer would tell."""
    answers = ("dull", "very very very good indeed , this film was wonderful indeed")
    module = data([{**ROW, "summary": answer} for answer in answers], truncation_side=side, max_tokens=18)
    short, long = module.split("test").encoded
    assert module.codec.with_answer(short, ()) == module.codec.with_answer(long, ())
    assert short.num_truncated == long.num_truncated > 0
    assert len(long.targets) == 8
    assert max(module.split("test").lengths) <= 18 + len(long.targets)


def test_a_column_may_have_a_default(data):
    rows = [{**ROW, "aspect": "the dog"}, ROW, {**ROW, "aspect": None}]
    module = data(rows, template="{soft}{aspect} : {document} {target}", defaults={"aspect": "story"})
    assert [e.fields["aspect"] for e in module.split("train").examples] == ["the dog", "story", "story"]


def test_prediction_wants_no_answers(data):
    module = data([{"document": "a dull film"}])
    assert module.split("predict").examples[0].target == ""
    with pytest.raises(DataError, match="no column 'summary'"):
        module.split("train")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"document": "  ", "summary": "a"}, "'document' is empty"),
        ({"document": "a dog", "summary": ""}, "'summary' must be non-empty text"),
        ({"document": "a dog", "summary": 3}, "'summary' must be non-empty text"),
        ({"document": ["a"], "summary": "a"}, "'document' must be text"),
        ({**ROW, "references": "a dog"}, "'references' must be a list of texts"),
    ],
)
def test_a_bad_row_is_named(data, row, said):
    with pytest.raises(DataError, match=said):
        data([ROW, row]).split("train")
    assert len(data([ROW, row], on_bad_row="skip").split("train")) == 1


def test_what_fits_is_what_is_read_whole(data):
    """Documents summed up in parts are those that would be cut."""
    for words in range(8, 26):
        module = data([{**ROW, "document": " ".join(["dog"] * words)}], long_documents="map_reduce",
                      decoding=Decoding(max_new_tokens=4))  # fmt: skip
        evaluation, example = module.evaluation, module.split("predict").examples[0]
        reduce = MapReduce(module.codec, module.template, "document", evaluation.max_tokens, evaluation.decoding)
        assert reduce.fits(example.fields) == (module.split("predict").encoded[0].num_truncated == 0)


@pytest.mark.parametrize("family", ["bert"])
def test_an_encoder_generates_nothing_and_says_so_at_once(data):
    with pytest.raises(ValueError, match="fills masks and generates no text"):
        data([ROW]).setup("fit")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"document": "text"}, "document must be a column of the template"),
        ({"generate_rows": 0}, "generate_rows and generate_minutes must be above 0"),
        ({"max_target_tokens": 24}, "max_target_tokens must be between 0 and max_tokens=24"),
    ],
)
def test_settings_that_make_no_sense_are_refused(data, options, said):
    with pytest.raises(ValueError, match=said):
        data([ROW], **options)
