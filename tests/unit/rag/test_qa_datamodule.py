"""Questions with passages."""

import logging
from itertools import product

import pytest
from questions import FILM, LEXICAL, ROW, TEXTS, documents_of, first_example
from row_files import write_rows

from lightning_softprompt.core.types import Answer, ShownPassage, Slot, Text
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.rag.passage_rendering import PassageTemplate
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.manifest import BadIndexError
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever

FAMILIES = ("llama",)


def test_an_example_contains_the_best_passages_and_all_retrieved_documents(make_qa_data):
    module = make_qa_data([ROW, FILM])
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


@pytest.mark.parametrize(
    ("order", "gold", "target"), [("score", "dog", "sad [1]"), ("reversed", "dog", "sad [2]"), ("score", "long", "sad")]
)
def test_targets_cite_the_gold_passages_by_number(make_qa_data, order, gold, target):
    passages = {"template": "[{number}] {text} ,", "order": order}
    module = make_qa_data([{**ROW, "positive_ids": [gold]}], answer_form={"cite": True}, passages=passages)
    assert first_example(module).target == target
    assert first_example(module).references == ("sad", "very sad")


def test_passage_templates_contain_the_number_the_title_and_the_document():
    passage = PassageTemplate("[{number}] {heading}{text} ({document}, {title}) {{}}\n")
    assert passage.render(3, ShownPassage("d7", "It {text}"), "Dogs") == "[3] Dogs: It {text} (d7, Dogs) {}\n"
    assert passage.render(1, ShownPassage("d7", "It barks"), "") == "[1] It barks (d7, ) {}\n"


@pytest.mark.parametrize("text", ["{number}", "{text}{rank}", "{text!r}", "{text:>9}", "{text.title}", "{text"])
def test_invalid_passage_templates_are_rejected(text):
    with pytest.raises(ValueError, match=r"must contain \{text\}|may contain only|invalid passage template"):
        PassageTemplate(text)


def test_the_slot_of_each_passage_is_at_its_position_in_the_passage_template(make_qa_data):
    module = make_qa_data([ROW], passages={"template": "( {soft}{text} ) {{soft}}", "count": 2})
    passages = [Text("( "), Slot(), Text(f"{TEXTS['dog']} ) {{soft}}( "), Slot()]
    passages.append(Text(f"{TEXTS['story']} ) {{soft}}"))
    pieces = [*passages, Slot(), Text(f"{ROW['question']} :"), Answer(" ")]
    assert module.split("test").encoded == [module.codec.encode(pieces, "sad", 48, True, target_tokens=4)]


@pytest.mark.parametrize(("mode", "start", "end"), [("retrieved", 1, 10), ("closed_book", 1, 1)])
def test_the_slots_of_missing_passages_follow_the_last_passage(make_qa_data, mode, start, end):
    passages = {"count": 3, "template": "{soft}{text} ,", "mode": mode}
    (row,) = make_qa_data([ROW], passages=passages, max_tokens=19).split("test").encoded
    assert row.slots == (start, end, end, end)


@pytest.mark.parametrize(
    ("passages", "max_tokens"),
    [({}, 48), ({"order": "reversed"}, 48), ({}, 12), ({"count": 3, "gold_position": 1}, 48)],
)
def test_slots_of_passages_do_not_change_the_tokens_of_a_row(make_qa_data, passages, max_tokens):
    def encode(template):
        module = make_qa_data([ROW, FILM], passages={**passages, "template": template}, max_tokens=max_tokens)
        return module.split("test")

    plain, with_slots = encode("{heading}{text} ,"), encode("{soft}{heading}{text} ,")
    assert [row.ids for row in plain.encoded] == [row.ids for row in with_slots.encoded]
    assert plain.examples[0].passages == with_slots.examples[0].passages


@pytest.mark.parametrize(
    ("passages", "names"),
    [
        ({}, ["dog", "story"]),
        ({"count": 1}, ["dog"]),
        ({"order": "reversed"}, ["story", "dog"]),
        ({"order": "shuffled"}, ["dog", "story"]),
        ({"count": 3, "gold_position": 0, "order": "reversed"}, ["dog", "well", "story"]),
        ({"count": 3, "gold_position": 1}, ["story", "dog", "well"]),
        ({"count": 3, "gold_position": -1}, ["story", "well", "dog"]),
        ({"count": 3, "gold_position": 9}, ["story", "well", "dog"]),
        ({"count": 3, "gold_position": -9}, ["dog", "story", "well"]),
        ({"mode": "gold"}, ["dog"]),
        ({"mode": "closed_book"}, []),
    ],
)
def test_passages_are_selected_by_mode_and_ordered_by_order_and_gold_position(make_qa_data, passages, names):
    example = first_example(make_qa_data([ROW], passages=passages))
    assert documents_of(example) == names
    assert len(example.fields["passages"]) == sum(len(TEXTS[name]) + 2 for name in names)


@pytest.mark.parametrize("mode", ["gold", "random", "closed_book"])
def test_modes_without_a_search_have_no_retrieved_documents(make_qa_data, mode):
    example = first_example(make_qa_data([ROW], passages={"mode": mode}))
    assert example.found == ()
    assert all(passage.rank is None for passage in example.passages)


def test_closed_book_requires_no_index(make_qa_data):
    module = make_qa_data(
        [ROW], passages={"mode": "closed_book"}, retriever=None, template="{soft}{question} : {target}"
    )
    assert first_example(module).target == "sad"


def test_gold_passages_are_in_the_order_of_their_row(make_qa_data):
    rows = [{**ROW, "positive_ids": ["well", "dog"]}, {**ROW, "positive_ids": []}]
    examples = make_qa_data(rows, passages={"mode": "gold"}).split("test").examples
    assert [documents_of(example) for example in examples] == [["well", "dog"], []]


def test_the_passage_of_a_copy_has_the_id_of_the_gold_document(make_qa_data, tmp_path):
    texts = {**TEXTS, "copy": TEXTS["dog"]}
    build_index(tmp_path / "copies", [Document(name, "", text) for name, text in texts.items()], LEXICAL)
    retriever = Retriever(str(tmp_path / "copies"), "lexical")
    example = first_example(
        make_qa_data([{**ROW, "positive_ids": ["copy"]}], passages={"mode": "gold"}, retriever=retriever)
    )
    assert example.passages == (ShownPassage("copy", TEXTS["dog"]),)


def test_random_passages_are_not_gold_and_depend_on_the_seed(make_qa_data):
    words = ("a", "it", "is", "that", "this", "what")
    rows = [{**ROW, "question": f"{first} {second} dog"} for first, second in product(words, words)]

    def draw(seed):
        examples = make_qa_data(rows, passages={"mode": "random"}, seed=seed).split("test").examples
        return [documents_of(example) for example in examples]

    draws = draw(0)
    assert draw(0) == draws
    assert draw(1) != draws
    assert set().union(*draws) == set(TEXTS) - {"dog"}
    assert all(len(set(names)) == 2 for names in draws)


# Maximum tokens


@pytest.mark.parametrize(
    ("available", "num_passages", "num_tokens"),
    [
        *((n, 1, 9) for n in (9, 12)),
        *((n, 2, 13) for n in (13, 19)),
        *((n, 3, 20) for n in (20, 34)),
    ],
)
def test_complete_passages_are_dropped_before_any_is_truncated(make_qa_data, available, num_passages, num_tokens):
    """The passages have 9, 4 and 7 tokens, start and question 6; 4 tokens are reserved for the answer, which has 2."""
    split = make_qa_data([ROW], passages={"count": 3}, max_tokens=10 + available).split("test")
    texts = [TEXTS["dog"], TEXTS["story"], TEXTS["well"]][:num_passages]
    assert split.examples[0].fields["passages"] == "".join(f"{text} ," for text in texts)
    assert [passage.text for passage in split.examples[0].passages] == texts
    assert len(split.encoded[0].ids) == 6 + num_tokens + 2
    assert split.encoded[0].num_truncated == 0


@pytest.mark.parametrize("available", range(1, 9))
def test_the_best_passage_is_truncated_if_it_does_not_fit(make_qa_data, available):
    split = make_qa_data([ROW], passages={"count": 3}, max_tokens=10 + available).split("test")
    words = TEXTS["dog"].split()[: available - 1]  # the passage ends with a comma
    texts = [" ".join(words)] if words else []
    assert [passage.text for passage in split.examples[0].passages] == texts
    assert split.examples[0].fields["passages"] == "".join(f"{text} ," for text in texts)
    num_tokens = available if words else 0
    assert len(split.encoded[0].ids) == 6 + num_tokens + 2
    assert split.encoded[0].num_truncated == 0


@pytest.mark.parametrize(("order", "gold_position"), [("score", None), ("reversed", None), ("score", -1)])
def test_passages_are_dropped_by_rank_in_any_order(make_qa_data, order, gold_position):
    passages = {"count": 3, "order": order, "gold_position": gold_position}
    example = first_example(make_qa_data([ROW], passages=passages, max_tokens=28))
    assert set(documents_of(example)) == {"dog", "story"}


def test_dropped_and_truncated_passages_are_reported_once_for_each_split(make_qa_data, caplog):
    module = make_qa_data([ROW, FILM], passages={"count": 3}, max_tokens=16)
    with caplog.at_level(logging.INFO, logger="lightning_softprompt"):
        module.split("test")
    messages = [record.getMessage() for record in caplog.records if "Passages" in record.getMessage()]
    assert messages == ["Passages of the 2 test rows at max_tokens=16: 2 shown; 3 dropped; 2 cut"]


def test_a_question_that_does_not_fit_is_reported_or_skipped(make_qa_data, tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", [ROW, {**ROW, "question": "is " * 60 + "dog"}]))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: a row exceeds max_tokens by \d+ tokens"):
        make_qa_data(path).split("test")
    assert len(make_qa_data(path, on_bad_row="skip").split("test")) == 1


def test_truncation_of_the_input_does_not_depend_on_the_answer(make_qa_data):
    rows = [ROW, {**ROW, "answers": ["very very very very sad indeed"]}]
    module = make_qa_data(rows, passages={"count": 3}, max_tokens=24)
    short, long = module.split("test").encoded
    assert module.codec.with_answer(short, ()) == module.codec.with_answer(long, ())


# Retrieval


def test_each_split_is_searched_once_and_not_again_by_another_run(make_qa_data, monkeypatch):
    searches, rank = [], Retriever.rank

    def record_and_rank(self, questions, k):
        searches.append(list(questions))
        return rank(self, questions, k)

    monkeypatch.setattr(Retriever, "rank", record_and_rank)
    module = make_qa_data([ROW, FILM, ROW])
    for epoch in range(2):
        module.setup("fit")
        for loader in (module.train_dataloader(), module.val_dataloader()):
            loader.batch_sampler.set_epoch(epoch)
            list(loader)
    assert searches == [[ROW["question"], FILM["question"]]]
    second_run = make_qa_data([ROW, FILM, ROW])
    assert second_run.split("train").examples == module.split("train").examples
    assert len(searches) == 1


def test_a_missing_index_is_reported_with_the_command_that_builds_one(make_qa_data, tmp_path):
    with pytest.raises(BadIndexError, match="softprompt index build"):
        make_qa_data([ROW], retriever=Retriever(str(tmp_path / "none"), "lexical")).split("test")
