"""Rows whose answers are text."""

import pytest

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.data.summarization import SummarizationDataModule
from lightning_softprompt.evaluation.map_reduce import MapReduce

FAMILIES = ("llama", "t5")
ROW = {"document": "it is a sad story about a dog that never ends well", "summary": "a sad dog story"}


@pytest.fixture
def make_data(family, tiny_folder):
    """Returns a function that creates a data module with the same rows in each split."""
    defaults = {"template": "{soft}{document} : {target}", "max_tokens": 24, "max_target_tokens": 8, "cache": False}

    def make_data(rows, **options):
        spec = BackboneSpec(name=str(tiny_folder(family)))
        splits = dict.fromkeys(("train", "validation", "test", "predict"), rows)
        return SummarizationDataModule(backbone=spec, **splits, **{**defaults, **options})

    return make_data


def test_an_example_has_all_references_of_its_row(make_data):
    rows = [ROW, {**ROW, "references": ["a sad dog story", "a dog story", " "]}, {**ROW, "references": None}]
    examples = make_data(rows).split("train").examples
    assert [e.references for e in examples] == [
        (ROW["summary"],),
        ("a sad dog story", "a dog story"),
        (ROW["summary"],),
    ]
    batch = next(iter(make_data(rows).test_dataloader()))
    assert {example.target for example in batch.examples} == {"a sad dog story"}


def test_targets_end_with_the_stop_token(make_data):
    module = make_data([ROW])
    assert module.split("train").encoded[0].targets[-1:] == module.codec.stop


@pytest.mark.parametrize("side", ["end", "start", "middle"])
def test_truncation_of_the_input_does_not_depend_on_the_answer(make_data, side):
    """Otherwise the model could infer the length of the answer from its input."""
    answers = ("dull", "very very very good indeed , this film was wonderful indeed")
    module = make_data([{**ROW, "summary": answer} for answer in answers], truncation_side=side, max_tokens=18)
    short, long = module.split("test").encoded
    assert module.codec.with_answer(short, ()) == module.codec.with_answer(long, ())
    assert short.num_truncated == long.num_truncated > 0
    assert len(long.targets) == 8
    assert max(module.split("test").lengths) <= 18 + len(long.targets)


def test_a_missing_value_of_a_column_is_replaced_by_its_default(make_data):
    rows = [{**ROW, "aspect": "the dog"}, ROW, {**ROW, "aspect": None}]
    module = make_data(rows, template="{soft}{aspect} : {document} {target}", defaults={"aspect": "story"})
    assert [e.fields["aspect"] for e in module.split("train").examples] == ["the dog", "story", "story"]


def test_prediction_requires_no_answers(make_data):
    module = make_data([{"document": "a dull film"}])
    assert module.split("predict").examples[0].target == ""
    with pytest.raises(DataError, match="no column 'summary'"):
        module.split("train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"document": "  ", "summary": "a"}, "'document' is empty"),
        ({"document": "a dog", "summary": ""}, "'summary' must be non-empty text"),
        ({"document": "a dog", "summary": 3}, "'summary' must be non-empty text"),
        ({"document": ["a"], "summary": "a"}, "'document' must be text"),
        ({**ROW, "references": "a dog"}, "'references' must be a list of texts"),
    ],
)
def test_a_bad_row_is_rejected_or_skipped(make_data, row, message):
    with pytest.raises(DataError, match=message):
        make_data([ROW, row]).split("train")
    assert len(make_data([ROW, row], on_bad_row="skip").split("train")) == 1


def test_map_reduce_splits_a_document_only_if_it_would_be_truncated(make_data):
    decoding = Decoding(max_new_tokens=4)
    for num_words in range(8, 26):
        rows = [{**ROW, "document": " ".join(["dog"] * num_words)}]
        module = make_data(rows, long_documents="map_reduce", decoding=decoding)
        split = module.split("predict")
        reduce = MapReduce(module.codec, module.template, "document", module.evaluation.max_tokens, decoding)
        assert reduce.fits(split.examples[0].fields) == (split.encoded[0].num_truncated == 0)


@pytest.mark.parametrize("family", ["bert"])
def test_a_masked_model_is_rejected_before_training(make_data):
    with pytest.raises(ValueError, match="fills masks and generates no text"):
        make_data([ROW]).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document": "text"}, "document must be a column of the template"),
        ({"generate_rows": 0}, "generate_rows and generate_minutes must be above 0"),
        ({"max_target_tokens": 24}, "max_target_tokens must be between 0 and max_tokens=24"),
    ],
)
def test_invalid_options_are_rejected(make_data, options, message):
    with pytest.raises(ValueError, match=message):
        make_data([ROW], **options)
