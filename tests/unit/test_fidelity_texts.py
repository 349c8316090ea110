# SPDX-License-Identifier: Apache-2.0
"""Contexts and needles are cut to the token, and are the same for the same seed."""

from pathlib import Path

import pytest

from benchmarks.fidelity.contexts import Context, Cutter, Row, Texts, load_texts
from benchmarks.fidelity.haystack import KINDS, needles
from lava_sglang.tools.passages import PassageError
from tests.unit.tiny_tokenizer import tiny_tokenizer

SENTENCES = "".join(f"In the year {year} it rained, and the king slept. " for year in range(900))
BOOKS = {"rain": SENTENCES, "short": "Too short to hold a needle."}


@pytest.fixture
def cutter() -> Cutter:
    return Cutter(tiny_tokenizer(), Texts(BOOKS, []))


def test_needles_are_in_the_text_where_they_say(cutter: Cutter) -> None:
    found = list(needles(cutter, KINDS, [700, 1000], 20, distractors=0))
    assert len({needle.name for needle in found}) == 4 * 20
    for needle in found:
        text = cutter.tokenizer.decode(needle.tokens[: needle.question_start])
        fact = text[text.index(" The secret code of") :]
        key = fact.split()[4].removesuffix(":")
        assert fact.startswith(f" The secret code of {key}: {needle.answer}.")
        before = text[text.index("[user]") + len("[user]") : text.index(fact)]
        after = fact.removeprefix(f" The secret code of {key}: {needle.answer}.")
        assert needle.depth == pytest.approx(len(before) / (len(before) + len(after)), abs=1e-9)
        assert before.rstrip().endswith("."), "a fact stands between sentences"
        assert before + after in SENTENCES
        question = cutter.tokenizer.decode(needle.tokens[needle.question_start :])
        assert question == (
            f"\n\nWhat is the secret code of {key}?\n[assistant]"
            f"The secret code of {key}: {needle.answer}"
        )
        assert cutter.tokenizer.decode(needle.tokens[needle.answer_start :]) == f" {needle.answer}"
        assert needle.answer_start == needle.length
    assert [n.length for n in found if n.kind == "phrase"] == [700, 1000] * 10


def test_answers_are_as_long_as_their_kind(cutter: Cutter) -> None:
    for needle in needles(cutter, KINDS, [800], 3, distractors=0):
        if needle.kind == "phrase":
            assert len(set(needle.answer.split())) == 6
        else:
            assert needle.answer.isdigit()
            assert len(needle.answer) == int(needle.kind.removeprefix("digits"))
        assert needle.answer_tokens == 1 + len(needle.answer)  # a byte a token, after a space


def test_every_part_of_the_text_gets_needles_of_every_length(cutter: Cutter) -> None:
    cells = {
        (needle.length, int(needle.depth * 5 * 0.999))
        for needle in needles(cutter, ["digits5"], [900, 1200], 40, distractors=0)
    }
    assert len(cells) == 10


def test_distractors_are_facts_about_other_keys(cutter: Cutter) -> None:
    for needle in needles(cutter, ["digits5"], [900], 10, distractors=3):
        text = cutter.tokenizer.decode(needle.tokens[: needle.question_start])
        keys = [fact.split(":")[0] for fact in text.split("The secret code of ")[1:]]
        assert len(set(keys)) == 4
        assert text.count(needle.answer) == 1
        assert len(needle.tokens) == 900 + needle.answer_tokens


def test_the_seed_decides_everything(cutter: Cutter) -> None:
    def built(seed: int) -> list[list[int]]:
        again = Cutter(tiny_tokenizer(), Texts(BOOKS, []), seed)
        return [needle.tokens for needle in needles(again, KINDS, [700], 2, 1)]

    assert built(0) == built(0)
    assert built(0) != built(1)


ROWS = [
    Row("qasper", "q1", "Q" * 900, "Who?"),
    Row("lcc", "c1", "x = 1\n" * 300, ""),
    Row("qasper", "q2", "too short", "Who?"),
    Row("multi_news", "n1", "N" * 900, ""),
]


def test_contexts_have_the_asked_length_and_books_their_next_tokens() -> None:
    cutter = Cutter(tiny_tokenizer(), Texts(BOOKS, ROWS))
    found = cutter.contexts(9, [300, 500], 64)
    assert [context.source for context in found[:6:2]] == ["book"] * 3
    assert len({context.name for context in found}) == 9
    for context in found:
        assert len(context.prompt) in (300, 500)
        text = cutter.tokenizer.decode(context.prompt)
        if context.source == "book":
            assert context.continuation is not None and len(context.continuation) == 64
            assert text + cutter.tokenizer.decode(context.continuation) in SENTENCES
        else:
            assert context.continuation is None
    assert cutter.contexts(4, [300, 500], 64) == found[:4], "more contexts change none before"


def test_rows_lose_their_middle_and_keep_their_question() -> None:
    cutter = Cutter(tiny_tokenizer(), Texts({}, ROWS))
    by_source = {context.source: context for context in cutter.contexts(3, [300], 64)}

    def text(context: Context) -> str:
        decoded: str = cutter.tokenizer.decode(context.prompt)
        return decoded

    question = "\n\nWho?\nAnswer in several sentences, with all details that the text gives."
    assert text(by_source["qasper"]).endswith(f"Q{question}\n[assistant]")
    assert text(by_source["multi_news"]).endswith("with its details.\n[assistant]")
    assert text(by_source["lcc"]).startswith("x = 1\n"), "code is not a chat"
    with pytest.raises(PassageError, match="--contexts=4: accepts up to 3"):
        cutter.contexts(4, [300], 64)


def test_a_model_without_a_chat_format_is_asked_in_plain_text() -> None:
    cutter = Cutter(tiny_tokenizer(None), Texts({}, ROWS[:1]))
    (context,) = cutter.contexts(1, [300], 64)
    text = cutter.tokenizer.decode(context.prompt)
    assert text.startswith("QQ") and text.endswith("that the text gives.\n")


def test_texts_of_a_folder_and_of_python(tmp_path: Path) -> None:
    with pytest.raises(PassageError, match=r"holds no \.txt file and no \.jsonl file"):
        load_texts(str(tmp_path))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("A book.")
    (tmp_path / "trec.jsonl").write_text(
        '{"_id": "1", "context": "c", "input": "i", "answers": ["a", "b"]}\n'
    )
    texts = load_texts(str(tmp_path))
    assert texts.books == {"a": "A book."}
    assert texts.rows == [Row("trec", "1", "c", "i")]
    assert len(load_texts(None).books) > 5
