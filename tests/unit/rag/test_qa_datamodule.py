"""Questions with passages beside them."""

import io
import json
import logging
import pickle
from collections import Counter

import pytest

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Answer, ShownPassage, Slot, Text
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.multitask import MultitaskDataModule
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.evaluation.multiple_choice import ChoiceEvaluation
from lightning_softprompt.rag.answer_form import AnswerForm
from lightning_softprompt.rag.index_setup import ensure_index
from lightning_softprompt.rag.passage_rendering import PassageTemplate
from lightning_softprompt.rag.passage_selection import PassageNoise, PassageSettings
from lightning_softprompt.rag.qa_datamodule import RagQaDataModule
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.manifest import BadIndexError
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

FAMILIES = ("llama",)
TEXTS = {
    "dog": "the dog is sad . it never ends",
    "story": "a dog film",
    "film": "a warm and funny film",
    "well": "all is well that ends well",
    "text": "one text",
    "long": "a long long long text",
}
LEXICAL = IndexSettings(encoder=None)
ROW = {"question": "is the dog sad", "answers": ["sad", "very sad", "sad"], "positive_ids": ["dog"]}
FILM = {"question": "what film ?", "answers": ["warm", "funny"], "positive_ids": ["film"]}
TEMPLATE = "{passages}{soft}{question} : {target}"
PASSAGE = "{heading}{text} ,"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rag") / "index"
    titled = {"film": "Film"}
    build_index(folder, [Document(name, titled.get(name, ""), text) for name, text in TEXTS.items()], LEXICAL)
    return folder


@pytest.fixture
def data(family, tiny_folder, folder):
    def data(rows, passages=None, answer_form=None, **options):
        splits = dict.fromkeys(("train", "validation", "test", "predict"), rows)
        groups = {
            "passages": PassageSettings(**{"template": PASSAGE, "count": 2, **(passages or {})}),
            "answer_form": AnswerForm(**(answer_form or {})),
        }
        usual = {**groups, "template": TEMPLATE, "max_tokens": 48, "max_target_tokens": 4}
        retriever = Retriever(str(folder), "lexical")
        spec = BackboneSpec(name=str(tiny_folder(family)))
        given = {"backbone": spec, "retriever": retriever, "cache": False, **splits, **usual, **options}
        return RagQaDataModule(**given)

    return data


def documents(example):
    return [shown.document for shown in example.passages]


def first(module, split="test"):
    return module.split(split).examples[0]


def test_a_row_shows_what_was_found_and_knows_all_of_it(data):
    module = data([ROW, FILM])
    example, other = module.split("test").examples
    assert example.passages == (ShownPassage("dog", TEXTS["dog"], 0), ShownPassage("story", TEXTS["story"], 1))
    assert example.fields["passages"] == f"{TEXTS['dog']} ,{TEXTS['story']} ,"
    assert example.found[:2] == ("dog", "story")
    assert example.gold == ("dog",)
    assert example.target == "sad"
    assert example.references == ("sad", "very sad")
    assert other.fields["passages"] == f"Film: {TEXTS['film']} ,{TEXTS['story']} ,"
    encoded = module.split("test").encoded[0]
    tokens = module.codec.tokenizer.convert_ids_to_tokens(encoded.ids)
    assert " ".join(tokens) == "<s> the dog is sad . it never ends , a dog film , is the dog sad : sad </s>"
    assert encoded.slots == (1 + 9 + 4,)
    assert module.describe_row("test", 0)["input"].startswith("the dog is sad")


def test_targets_name_the_gold_passages_by_number(data):
    cited = {"answer_form": {"cite": True}, "passages": {"template": "[{number}] {text} ,"}}
    assert first(data([ROW], **cited)).target == "sad [1]"
    cited["passages"]["order"] = "reversed"
    reversed_ = data([ROW, FILM], **cited)
    assert [example.target for example in reversed_.split("test").examples] == ["sad [2]", "warm [2]"]
    assert first(reversed_).references == ("sad", "very sad")
    assert first(data([{**ROW, "positive_ids": ["long"]}], **cited)).target == "sad"


def test_drawn_rows_name_them_where_they_stand_then(data):
    drawn = data(
        [ROW],
        answer_form={"cite": True, "training_target": "any"},
        passages={"template": "[{number}] {text} ,", "order": "shuffled"},
        batch_size=1,
    )
    seen = set()
    for (example,) in epochs(drawn, 30):
        place = documents(example).index("dog") + 1
        assert example.target in (f"sad [{place}]", f"very sad [{place}]")
        seen.add(example.target)
    assert len(seen) == 4


def test_passages_are_numbered_in_the_order_in_which_they_are_shown():
    passage = PassageTemplate("[{number}] {heading}{text} ({document}, {title}) {{}}\n")
    assert passage.render(3, ShownPassage("d7", "It {text}"), "Dogs") == "[3] Dogs: It {text} (d7, Dogs) {}\n"
    assert passage.render(1, ShownPassage("d7", "It barks"), "") == "[1] It barks (d7, ) {}\n"


@pytest.mark.parametrize("text", ["{number}", "{text}{rank}", "{text!r}", "{text:>9}", "{text.title}", "{text"])
def test_a_passage_that_cannot_be_written_is_refused(text):
    with pytest.raises(ValueError, match=r"must contain \{text\}|may contain only|invalid passage template"):
        PassageTemplate(text)


def test_a_slot_at_each_passage_stands_where_the_passage_has_it(data):
    module = data([ROW], passages={"template": "( {soft}{text} ) {{soft}}", "count": 2})
    pieces = [Text("( "), Slot(), Text(f"{TEXTS['dog']} ) {{soft}}( "), Slot(), Text(f"{TEXTS['story']} ) {{soft}}")]
    pieces += [Slot(), Text(f"{ROW['question']} :"), Answer(" ")]
    assert module.split("test").encoded == [module.codec.encode(pieces, "sad", 48, True, target_tokens=4)]


def test_slots_of_passages_that_a_row_lacks_stand_behind_its_last_one(data):
    passages = {"count": 3, "template": "{soft}{text} ,"}
    for mode, begins, behind in (("retrieved", 1, 10), ("closed_book", 1, 1)):
        (row,) = data([ROW], passages={**passages, "mode": mode}, max_tokens=19).split("test").encoded
        assert row.slots == (begins, behind, behind, behind)


def test_slots_at_each_passage_leave_the_words_of_a_row_as_they_were(data):
    several = {"count": 3, "gold_position": 1}
    for passages, options in (({}, {}), ({"order": "reversed"}, {}), ({}, {"max_tokens": 12}), (several, {})):
        plain, marked = (
            data([ROW, FILM], passages={**passages, "template": template}, **options)
            for template in (PASSAGE, "{soft}" + PASSAGE)
        )
        assert [row.ids for row in plain.split("test").encoded] == [row.ids for row in marked.split("test").encoded]
        assert plain.split("test").examples[0].passages == marked.split("test").examples[0].passages


def test_drawn_rows_have_as_many_slots_however_many_passages_they_keep(data):
    module = data(
        [ROW, FILM], passages={"template": "{soft}{text} ,", "count": 3, "noise": PassageNoise(drop=0.5)}, batch_size=2
    )
    loader, seen = module.train_dataloader(), set()
    for epoch in range(10):
        loader.batch_sampler.set_epoch(epoch)
        seen |= {tuple(row) for batch in loader for row in batch.slots.tolist()}
    assert {len(slots) for slots in seen} == {4}
    assert len({slots[0] == slots[1] for slots in seen}) == 2  # a row without any passage, and one with some


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, ["dog", "story"]),
        ({"passages": {"count": 1}}, ["dog"]),
        ({"passages": {"order": "reversed"}}, ["story", "dog"]),
        ({"passages": {"order": "shuffled"}}, ["dog", "story"]),
        ({"passages": {"count": 3, "gold_position": 0, "order": "reversed"}}, ["dog", "well", "story"]),
        ({"passages": {"count": 3, "gold_position": 1}}, ["story", "dog", "well"]),
        ({"passages": {"count": 3, "gold_position": -1}}, ["story", "well", "dog"]),
        ({"passages": {"count": 3, "gold_position": 9}}, ["story", "well", "dog"]),
        ({"passages": {"count": 3, "gold_position": -9}}, ["dog", "story", "well"]),
        ({"passages": {"mode": "gold"}}, ["dog"]),
        ({"passages": {"mode": "closed_book"}}, []),
    ],
)
def test_modes_and_orders(data, options, shown):
    example = first(data([ROW], **options))
    assert documents(example) == shown
    assert len(example.fields["passages"]) == sum(len(TEXTS[name]) + 2 for name in shown)


def test_what_was_not_looked_for_is_not_called_found(data):
    for mode in ("gold", "random", "closed_book"):
        example = first(data([ROW], passages={"mode": mode}))
        assert example.found == ()
        assert {shown.rank for shown in example.passages} <= {None}


def test_without_passages_no_index_is_wanted(data):
    example = first(
        data([ROW], passages={"mode": "closed_book"}, retriever=None, template="{soft}{question} : {target}")
    )
    assert example.target == "sad"


def test_gold_passages_come_in_the_order_of_the_row(data):
    rows = [{**ROW, "positive_ids": ["well", "dog"]}, {**ROW, "positive_ids": []}]
    examples = data(rows, passages={"mode": "gold"}).split("test").examples
    assert [documents(example) for example in examples] == [["well", "dog"], []]


def test_a_copy_of_the_gold_document_is_shown_under_its_id(data, tmp_path):
    texts = {**TEXTS, "copy": TEXTS["dog"]}
    build_index(tmp_path / "copies", [Document(name, "", text) for name, text in texts.items()], LEXICAL)
    retriever = Retriever(str(tmp_path / "copies"), "lexical")
    example = first(data([{**ROW, "positive_ids": ["copy"]}], passages={"mode": "gold"}, retriever=retriever))
    assert example.passages == (ShownPassage("copy", TEXTS["dog"]),)


def test_random_passages_are_not_gold_and_the_same_each_time(data):
    words = ("a", "it", "is", "that", "this", "what")
    rows = [{**ROW, "question": f"{one} {other} dog"} for one in words for other in words]
    runs = [
        [documents(e) for e in data(rows, passages={"mode": "random"}, seed=seed).split("test").examples]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    drawn = Counter(name for shown in runs[0] for name in shown)
    assert set(drawn) == set(TEXTS) - {"dog"}
    assert all(len(set(shown)) == 2 for shown in runs[0])


# Budget


def fitting(module):
    split = module.split("test")
    return split.examples[0], split.encoded[0]


def test_whole_passages_are_dropped_before_any_is_cut_the_worst_first(data):
    """Beginning and question take 6 tokens, 4 are set aside for the answer; the passages take 9, 4 and 7."""
    for room in range(11, 45):
        free = room - 10
        example, encoded = fitting(data([ROW], passages={"count": 3}, max_tokens=room))
        texts = [shown.text for shown in example.passages]
        whole = 3 if free >= 20 else 2 if free >= 13 else 1
        if free >= 9:
            assert texts == [TEXTS["dog"], TEXTS["story"], TEXTS["well"]][:whole]
        else:
            assert texts == ([" ".join(TEXTS["dog"].split()[: free - 1])] if free > 1 else [])
        assert example.fields["passages"] == "".join(f"{text} ," for text in texts)
        tokens = {3: 20, 2: 13, 1: min(free, 9) if free > 1 else 0}[whole]
        assert (len(encoded.ids), encoded.num_truncated) == (6 + tokens + 2, 0)


def test_dropped_passages_go_by_rank_wherever_they_stand(data):
    for order, gold_at in (("score", None), ("reversed", None), ("score", -1)):
        example, _ = fitting(
            data([ROW], passages={"count": 3, "order": order, "gold_position": gold_at}, max_tokens=28)
        )
        assert set(documents(example)) == {"dog", "story"}


def test_what_was_lost_is_told_once_for_each_split(data, caplog):
    module = data([ROW, FILM], passages={"count": 3}, max_tokens=16)
    with caplog.at_level(logging.INFO, logger="lightning_softprompt"):
        module.split("test")
    messages = [record.getMessage() for record in caplog.records if "Passages" in record.getMessage()]
    assert messages == ["Passages of the 2 test rows at max_tokens=16: 2 shown; 3 dropped; 2 cut"]


def test_a_question_that_does_not_fit_is_an_error_with_its_place(data, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, {**ROW, "question": "is " * 60 + "dog"})))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: a row exceeds max_tokens by \d+ tokens"):
        data(str(path)).split("test")
    assert len(data(str(path), on_bad_row="skip").split("test")) == 1


def test_what_is_read_does_not_depend_on_the_answer(data):
    rows = [ROW, {**ROW, "answers": ["very very very very sad indeed"]}]
    module = data(rows, passages={"count": 3}, max_tokens=24)
    short, long = module.split("test").encoded
    assert module.codec.with_answer(short, ()) == module.codec.with_answer(long, ())


# Answers


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        ("sad", ("sad",)),
        ([" sad ", "", "sad"], ("sad",)),
        ([], ("well",)),
        (None, ("well",)),
    ],
)
def test_answers_are_a_text_or_several_or_none(data, answers, right):
    example = first(data([{**ROW, "answers": answers}], answer_form={"abstain": "well"}))
    assert example.references == right
    assert example.target == right[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"question": " "}, "column 'question' is empty"),
        ({"question": 3}, "column 'question' must be text"),
        ({"answers": []}, "column 'answers' has no answer; set answer_form.abstain"),
        ({"answers": [3]}, "column 'answers' must be a text or a list of texts"),
        ({"positive_ids": "dog"}, "column 'positive_ids' must be a list of document ids"),
    ],
)
def test_a_bad_row_is_named(data, changed, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, {**ROW, **changed})))
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {said}"):
        data(str(path)).split("test")
    assert len(data(str(path), on_bad_row="skip").split("test")) == 1


def test_gold_documents_that_are_nowhere_are_named(data):
    with pytest.raises(DataError, match="the gold document 'cat' has no passage"):
        data([{**ROW, "positive_ids": ["cat"]}], passages={"mode": "gold"}).split("test")
    with pytest.raises(DataError, match="mode=gold requires document ids in column 'positive_ids'"):
        data([{"question": "is it ?", "answers": "dog"}], passages={"mode": "gold"}).split("test")


def test_columns_may_have_other_names(data):
    row = {"asked": "is the dog sad", "long": "it is very sad", "docs": [7]}
    names = {"question": "asked", "answers": "long", "gold": "docs", "template": "{passages}{soft}{asked} {target}"}
    example = first(data([row], **names))
    assert (example.target, example.gold, example.fields["question"]) == ("it is very sad", ("7",), row["asked"])
    with pytest.raises(DataError, match="no column 'answers'"):
        first(data([row], **{**names, "answers": "answers"}))


def test_prediction_wants_no_answers(data):
    example = first(data([{"question": "is the dog sad"}]), "predict")
    assert (example.target, example.references, documents(example)) == ("", (), ["dog", "story"])


def test_choices_are_classes(data):
    rows = [{**ROW, "answers": ["no"]}, {**ROW, "answers": "yes"}]
    module = data(rows, answer_form={"choices": {"yes": "good", "no": "bad"}})
    assert [(e.label, e.target, e.references) for e in module.split("test").examples] == [
        (1, "bad", ("no",)),
        (0, "good", ("yes",)),
    ]
    assert module.classes.words == {"yes": [" good"], "no": [" bad"]}
    assert isinstance(module.evaluation, ChoiceEvaluation)
    assert len(module.split("test").encoded[0].targets) == 1  # nothing ends it
    batch = next(iter(module.test_dataloader()))
    assert sorted(batch.labels.tolist()) == [0, 1]
    assert module.split("predict").examples[0].label is None
    with pytest.raises(DataError, match=r"must name one of the choices \['yes', 'no'\], got \['sad'"):
        data([ROW], answer_form={"choices": ["yes", "no"]}).split("test")


def test_plain_text_on_standard_input_is_a_question(data, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"is the dog sad ?\n")))
    module = data([ROW], predict="-")
    assert [example.fields["question"] for example in module.split("predict").examples] == ["is the dog sad ?"]


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        ({"text": ["sad", "very sad"], "answer_start": [3, 9]}, ("sad", "very sad")),
        ([{"text": "sad", "answer_start": 3}, {"text": "sad", "answer_start": 9}], ("sad",)),
        ({"text": [], "answer_start": []}, ("none",)),
        ("[1]", ("[1]",)),
        ('("sad")', ('("sad")',)),
        ("{x}", ("{x}",)),
    ],
)
def test_answers_may_have_the_forms_of_squad(data, answers, references):
    module = data([{**ROW, "answers": answers}], answer_form={"abstain": "none"})
    assert module.split("test").examples[0].references == references


@pytest.mark.parametrize(
    "answers", ["['sad', 'very sad']", '["sad"]', """['sad', "it's"]""", "['sad' 'bad']", "[]", ["['sad']"],
                "('sad',)", "('sad', 'bad')", "array(['sad'], dtype=object)", "{'sad', 'bad'}",
                "{'text': array(['sad'], dtype=object), 'answer_start': array([3])}"],
)  # fmt: skip
def test_a_list_that_a_table_holds_as_text_is_refused(data, answers):
    with pytest.raises(DataError, match=r"column 'answers' holds a list written as text, .*Save the rows as JSON"):
        data([{**ROW, "answers": answers}]).split("test")


def test_choices_are_text_whether_a_config_quotes_them_or_not(data):
    module = data([{**ROW, "answers": "0"}, {**ROW, "answers": "1"}], answer_form={"choices": {1: "good", 0: "bad"}})
    assert [example.label for example in module.split("test").examples] == [1, 0]
    with pytest.raises(ValueError, match=r"choices: a name or word is expected, got False.*quotes"):
        data([ROW], answer_form={"choices": {False: "bad", True: "good"}})
    with pytest.raises(ValueError, match=r"choices, class 'no': a name or word is empty"):
        data([ROW], answer_form={"choices": {"no": "", "yes": "good"}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retriever": None}, "mode=retrieved requires a retriever"),
        ({"passages": {"count": 0}}, "count must be at least 1"),
        ({"num_retrieved": 1}, "num_retrieved=1 is less than passages.count=2"),
        ({"passages": {"mode": "oracle"}}, "mode must be one of retrieved, gold, random, closed_book"),
        ({"passages": {"order": "best"}}, "order one of score, reversed, shuffled"),
        (
            {"passages": {"mode": "random", "noise": PassageNoise(drop=0.5)}},
            "noise requires mode=retrieved or mode=gold",
        ),
        ({"template": "{soft}{question} {target}"}, r"template must contain \{passages\}"),
        ({"template": "{passages}{soft}{target}"}, "question must be a column of the template"),
        ({"max_target_tokens": 48}, "max_target_tokens must be between 0 and max_tokens=48"),
        ({"answer_form": {"choices": ["yes"]}}, "at least two choices are required"),
        ({"answer_form": {"choices": ["yes", "no"], "abstain": "well"}}, "add it to choices"),
        ({"answer_form": {"choices": ["yes", "no"], "cite": True}}, "cite requires generated answers"),
        ({"answer_form": {"cite": True}}, r"cite requires \{number\} in passages\.template"),
        (
            {"passages": {"noise": PassageNoise(drop=0.5)}, "batch_tokens": 200},
            "batch_tokens requires rows of the same length",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(data, options, said):
    with pytest.raises(ValueError, match=said):
        data([ROW], **options)


def test_shares_of_noise_are_shares():
    with pytest.raises(ValueError, match=r"values of noise must be between 0 and 1, got \{'drop': 1.5\}"):
        PassageNoise(drop=1.5)


@pytest.mark.parametrize("family", ["bert"])
def test_an_encoder_chooses_but_generates_nothing(data):
    with pytest.raises(ValueError, match="fills masks and generates no text"):
        data([ROW]).setup("test")
    data([{**ROW, "answers": "yes"}], answer_form={"choices": ["yes", "no"]}).setup("test")


# Searching


def test_each_split_is_searched_once_and_not_again_by_another_run(data, monkeypatch):
    asked = []
    rank = Retriever.rank
    monkeypatch.setattr(Retriever, "rank", lambda self, q, k: asked.append(list(q)) or rank(self, q, k))
    module = data([ROW, FILM, ROW])
    for epoch in range(2):
        module.setup("fit")
        for loader in (module.train_dataloader(), module.val_dataloader()):
            loader.batch_sampler.set_epoch(epoch)
            list(loader)
    assert asked == [[ROW["question"], FILM["question"]]]
    again = data([ROW, FILM, ROW])
    assert again.split("train").examples == module.split("train").examples
    assert len(asked) == 1


def test_a_missing_index_is_an_error_that_says_how_to_make_one(data, tmp_path):
    with pytest.raises(BadIndexError, match="softprompt index build"):
        data([ROW], retriever=Retriever(str(tmp_path / "none"), "lexical")).split("test")


@pytest.fixture
def corpus(tmp_path):
    return written(tmp_path, TEXTS)


def written(folder, texts):
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
    return str(path)


def test_an_index_is_built_where_it_is_missing_and_left_where_it_is_there(data, tmp_path, corpus):
    retriever = Retriever(str(tmp_path / "made"), "lexical")
    module = data([ROW], retriever=retriever, corpus=corpus, index_settings=LEXICAL)
    module.prepare_data()
    assert documents(first(module)) == ["dog", "story"]
    before = (tmp_path / "made" / "manifest.json").read_bytes()
    module.prepare_data()
    data([ROW], retriever=retriever, corpus=corpus).prepare_data()
    assert (tmp_path / "made" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({**TEXTS, "cat": "a cat"}, "it lacks the document 'cat'"),
        ({name: text for name, text in TEXTS.items() if name != "long"}, "its document 'long' is not in the corpus"),
        ({**TEXTS, "film": "a dull film"}, "the document 'film' has changed"),
    ],
)
def test_an_index_of_another_corpus_is_refused(tmp_path, corpus, texts, said):
    ensure_index(tmp_path / "made", corpus, LEXICAL)
    ensure_index(tmp_path / "made", written(tmp_path, dict(reversed(TEXTS.items()))))
    with pytest.raises(DataError, match=f"does not contain the corpus .*{said}.*Remove the folder"):
        ensure_index(tmp_path / "made", written(tmp_path, texts))


def test_an_index_of_other_settings_is_refused(tmp_path, corpus):
    ensure_index(tmp_path / "made", corpus, LEXICAL)
    with pytest.raises(DataError, match=r"other settings: size was 200 and is 100\. Remove"):
        ensure_index(tmp_path / "made", corpus, IndexSettings(encoder=None, size=100))


def test_a_folder_of_something_else_is_refused(tmp_path, corpus):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "thesis.tex").write_text("all of it")
    with pytest.raises(BadIndexError, match=r"contains thesis\.tex"):
        ensure_index(tmp_path / "made", corpus, LEXICAL)


# Draws


def epochs(module, count=3, split="train"):
    """By epoch, the rows as they are trained on, in the order of their numbers."""
    loader, seen = module.train_dataloader(), []
    for epoch in range(count):
        loader.batch_sampler.set_epoch(epoch)
        rows = [row for batch in loader for row in zip(batch.row_ids, batch.examples, strict=True)]
        seen.append([example for _, example in sorted(rows, key=lambda row: row[0])])
    return seen


ROWS = [{**ROW, "question": f"{'wonderful ' * n}is the dog sad"} for n in range(8)]


@pytest.mark.parametrize("workers", [0, 1])
def test_draws_are_a_function_of_seed_epoch_and_row(data, workers):
    options = {
        "passages": {"count": 4, "order": "shuffled", "noise": PassageNoise(0.5, 0.3, 0.3)},
        "answer_form": {"training_target": "any"},
        "batch_size": 3,
    }
    once, again, other = (
        epochs(data(ROWS, **options, seed=s, num_workers=w)) for s, w in ((0, 0), (0, workers), (1, 0))
    )
    assert once == again
    assert once != other
    assert once[0] != once[1] != once[2]
    assert all(len(epoch) == len(ROWS) for epoch in once)


def test_without_draws_every_epoch_is_the_same(data):
    module = data(ROWS, passages={"count": 3})
    assert not module.resamples
    one, two = epochs(module, 2)
    assert one == two == module.split("train").examples


def test_shuffling_loses_nothing_and_scoring_is_not_shuffled(data):
    module = data(ROWS, passages={"count": 3, "order": "shuffled"})
    seen = epochs(module, 60)
    orders = {tuple(documents(epoch[0])) for epoch in seen}
    assert len(orders) == 6
    assert all(set(order) == {"dog", "story", "well"} for order in orders)
    assert {tuple(documents(e)) for e in module.split("test").examples} == {("dog", "story", "well")}


def test_a_passage_with_the_answer_is_never_replaced(data):
    seen = epochs(data(ROWS, passages={"count": 3, "noise": PassageNoise(distractors=0.5)}), 30)
    places = Counter(shown.rank is None for epoch in seen for e in epoch for shown in e.passages[1:])
    assert all(e.passages[0] == ShownPassage("dog", TEXTS["dog"], 0) for epoch in seen for e in epoch)
    assert 0.4 < places[True] / places.total() < 0.6
    assert not any(shown.document == "dog" for epoch in seen for e in epoch for shown in e.passages[1:])


def test_rows_whose_gold_is_taken_away_are_to_abstain(data):
    seen = epochs(
        data(ROWS, passages={"count": 2, "noise": PassageNoise(no_gold=0.5)}, answer_form={"abstain": "well"}), 30
    )
    rows = [e for epoch in seen for e in epoch]
    without = [e for e in rows if "dog" not in documents(e)]
    assert 0.4 < len(without) / len(rows) < 0.6
    assert {(e.target, e.references, tuple(documents(e))) for e in without} == {("well", ("well",), ("story", "well"))}
    assert {e.target for e in rows if "dog" in documents(e)} == {"sad"}


def test_without_abstain_they_are_answered_all_the_same(data):
    (seen,) = epochs(data(ROWS, passages={"noise": PassageNoise(no_gold=1.0)}), 1)
    assert {(e.target, tuple(documents(e))) for e in seen} == {("sad", ("story", "well"))}
    assert {
        tuple(documents(e)) for e in data(ROWS, passages={"noise": PassageNoise(no_gold=1.0)}).split("test").examples
    } == {("dog", "story")}


def test_passages_are_dropped_as_often_as_asked(data):
    seen = epochs(data(ROWS, passages={"count": 3, "noise": PassageNoise(drop=0.25)}), 40)
    counts = [len(e.passages) for epoch in seen for e in epoch]
    assert 0.7 < sum(counts) / (3 * len(counts)) < 0.8


def test_any_right_answer_is_said_as_often(data):
    module = data(ROWS, answer_form={"training_target": "any"})
    said = Counter(e.target for epoch in epochs(module, 30) for e in epoch)
    assert set(said) == {"sad", "very sad"}
    assert 0.4 < said["sad"] / said.total() < 0.6
    assert first(module).target == "sad"


def test_drawn_rows_fit_too(data):
    module = data(
        ROWS, passages={"count": 4, "noise": PassageNoise(distractors=0.5), "order": "shuffled"}, max_tokens=34
    )
    loader = module.train_dataloader()
    for epoch in range(5):
        loader.batch_sampler.set_epoch(epoch)
        assert all(int(batch.mask.sum(1).max()) <= 34 for batch in loader)


def test_a_loader_goes_on_with_the_draws_it_had_not_yet_seen(data):
    def batches(loader):
        return [batch.examples for batch in loader]

    options = {"passages": {"count": 4, "noise": PassageNoise(0.5, 0.3, 0.3)}, "batch_size": 2}
    whole = data(ROWS, **options).train_dataloader()
    whole.batch_sampler.set_epoch(2)
    expected = batches(whole)
    stopped = data(ROWS, **options).train_dataloader()
    stopped.batch_sampler.set_epoch(2)
    running = iter(stopped)
    seen = [next(running).examples]
    resumed = data(ROWS, **options).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert seen + batches(resumed) == expected


def test_drawn_rows_can_be_given_to_other_processes(data):
    loader = data(ROWS, passages={"noise": PassageNoise(drop=0.5)}).train_dataloader()
    rows = pickle.loads(pickle.dumps(loader.dataset))
    assert rows[11][2] == loader.dataset[11][2]


def test_tasks_of_one_run_are_not_drawn_anew(data, tiny_folder, family):
    spec = BackboneSpec(name=str(tiny_folder(family)))
    other = ClassificationDataModule(labels=["good", "bad"], backbone=spec, train=[{"text": "a", "label": "good"}])
    with pytest.raises(ValueError, match=r"the tasks \['asked'\] do"):
        MultitaskDataModule({"asked": data(ROWS, passages={"noise": PassageNoise(drop=0.5)}), "other": other})
