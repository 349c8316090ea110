# SPDX-License-Identifier: Apache-2.0
"""The benchmark tasks: metrics, made-up samples, truncation, and a run against a server."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import asker
import pytest
import tasks
from bootstrap import mean_of_means
from tasks_summary import AVERAGE, cells
from tasksets import infinitebench, metrics, ruler_needles
from tasksets.recipe import fill, inserted
from tasksets.sample import Fitter, Sample
from tasksets.suites import RULER, SUITES, samples, task_names

from lava_sglang.tools.demo.passages import PassageError
from lava_sglang.tools.server_process import Server
from tests.unit.tiny_llama import write_tiny_llama
from tests.unit.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer, write_tiny_tokenizer

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))
TOKENIZER = tiny_tokenizer()
MADE_UP = (*RULER, *SUITES["infinitebench"])
LENGTH = 12000  # bytes, which are this tokenizer's tokens
ROW = {"input": "Who wrote?", "answers": ["The clerk"], "all_classes": None}


def sample(*answers: str, metric: Any = metrics.qa_f1, **more: Any) -> Sample:
    return Sample("0", "task", "suite", "prompt", answers, 8, metric, **more)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"In the year {year} it rained. " for year in range(300))
    (folder / "rain.txt").write_text(text)
    rows = [ROW | {"_id": f"r{number}", "context": text} for number in range(3)]
    (folder / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    classes = {"_id": "t0", "context": "Question: a\nType: Place", "answers": ["Place"]}
    trec = ROW | classes | {"all_classes": ["Date", "Place"]}
    (folder / "trec.jsonl").write_text(json.dumps(trec) + "\n")
    return folder


@pytest.fixture
def fitter() -> Fitter:
    return Fitter(TOKENIZER, 2 * LENGTH)


@pytest.mark.parametrize(
    ("metric", "answers", "prediction", "score"),
    [
        # 2 of 3 words found, 2 of 2 wanted
        (metrics.qa_f1, ["the red fox"], "A fox, red: yes!", 0.8),
        (metrics.qa_f1, ["no", "red fox"], "red", 2 / 3),
        (metrics.qa_f1, ["no"], "yes", 0.0),
        (metrics.first_line_f1, ["red fox"], "\nred fox\nQuestion: what", 1.0),
        # longest common subsequence: "the cat sat" of 4 and 3 words
        (metrics.rouge_l, ["the cat sat"], "the cat quietly sat", 6 / 7),
        (metrics.rouge_l, ["the cat sat"], " . ", 0.0),
        (metrics.first_line_rouge_l, ["the cat sat"], "the cat sat\nDialogue:", 1.0),
        (metrics.count, ["12"], "12, or 7, or 12", 2 / 3),
        (metrics.count, ["12"], "a dozen", 0.0),
        (metrics.retrieval, ["Paragraph 3"], "Paragraph 3 or paragraph 30", 0.5),
        (metrics.code_similarity, ["x = 1"], "```python\n# set\nx = 1\ny = 2", 1.0),
        # 10 characters, 8 of them in common
        (metrics.code_similarity, ["x = 1"], "\nx = 2\n", 0.8),
        (metrics.code_similarity, ["x = 1"], "# only a comment", 0.0),
        (metrics.all_in_text, ["ABC", "def", "ghi"], "abc, DEF.", 2 / 3),
        (metrics.first_number, ["12345"], " 12345. 9", 1.0),
        (metrics.first_number, ["12345"], "9 12345", 0.0),
        (metrics.first_number, ["12345"], "123456", 0.0),
        (metrics.word, ["a-b"], 'It is "a-b".', 1.0),
        (metrics.word, ["a-b"], "a-bc", 0.0),
    ],
)
def test_scores_by_hand(metric: Any, answers: list[str], prediction: str, score: float) -> None:
    found = sample(*answers, metric=metric).score(prediction)
    assert found == pytest.approx(score, abs=1e-6)


def test_classification_counts_the_classes_that_are_named() -> None:
    row = sample(
        "Other location", metric=metrics.classification, classes=("Other location", "Other", "Date")
    )
    assert row.score("Other location") == 1, "a class within the right one's name is not named"
    assert row.score("Other location, Date") == 0.5
    assert row.score("Other") == row.score("Date") == row.score("") == 0
    first = row._replace(metric=metrics.first_line_classification)
    assert first.score("Other location\nDate") == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(ImportError, match=r"rouge is needed: pip install 'lava-sglang\[fidelity\]"):
        sample("a", metric=metrics.rouge_l).score("a")


@pytest.mark.parametrize("task", MADE_UP)
def test_made_up_samples(task: str, data: Path, fitter: Fitter) -> None:
    wanted = ([task], str(data), [LENGTH])
    found = list(samples(*wanted, 2, 0, fitter))
    assert found[:1] == list(samples(*wanted, 1, 0, fitter))
    assert found[0].prompt != found[1].prompt
    assert next(samples(*wanted, 1, 1, fitter)).prompt != found[0].prompt
    for made in found:
        assert made.task == f"{task}@{LENGTH}"
        assert LENGTH - 700 < fitter.count(made) + made.max_new_tokens <= LENGTH
        assert all(made.prompt.count(answer) >= 1 for answer in made.answers)
        assert made.score(" ".join(made.answers)) == 1
        assert made.score("nothing of it") == 0


def test_what_is_asked_for_does_not_depend_on_the_amount() -> None:
    make = ruler_needles.recipe("niah_multiquery", "0", {"rain": "It rained. The king slept. "})
    short, long = make(Random(0), 5), make(Random(0), 50)
    assert short.answers == long.answers and short.reply_start == long.reply_start
    assert len(short.answers) == 4 and len(short.prompt) < len(long.prompt)


def test_common_and_frequent_words_are_the_most_frequent(data: Path, fitter: Fitter) -> None:
    common, frequent = samples(["cwe", "fwe"], str(data), [LENGTH], 1, 0, fitter)
    listed = common.prompt.rsplit("most often.\n", 1)[1].split("\nQuestion")[0].split()[1::2]
    assert {listed.count(word) for word in common.answers} == {30}
    assert {listed.count(word) for word in listed} == {30, 3}
    coded = frequent.prompt.split("coded words. ")[1].split("\nQuestion")[0].split()
    ranked = sorted(set(coded), key=coded.count, reverse=True)
    assert ranked[0] == "..." and tuple(ranked[1:4]) == frequent.answers


def test_a_chain_leads_from_the_value_to_each_variable(data: Path, fitter: Fitter) -> None:
    (made,) = samples(["vt"], str(data), [LENGTH], 1, 0, fitter)
    question = made.prompt.rsplit("\n\n", 1)[1]
    first, *others = made.answers
    value = made.reply_start.rsplit("value ", 1)[1].split(",")[0]
    assert f"VAR {first} = {value}\n" in question
    for before, after in zip(made.answers, others, strict=False):
        assert question.index(f"VAR {after} = VAR {before}\n") > question.index(f"VAR {before} =")


@pytest.mark.parametrize("length", [700, 701, 5000, 40000])
def test_as_much_filler_as_fits(length: int) -> None:
    fitter = Fitter(TOKENIZER, length)
    make = ruler_needles.recipe("niah_single_1", "0", {})
    sizes: list[int] = []

    def counted(random: Random, amount: int) -> Sample:
        sizes.append(amount)
        return make(random, amount)

    made = fill(counted, "0", length, fitter)
    size = fitter.count(made) + made.max_new_tokens
    assert length - len(ruler_needles.NOISE) - 1 < size <= length
    assert len(sizes) <= 8


def test_insertion() -> None:
    assert inserted(["a", "b"], ["1", "2", "3"], [0, 2, 2]) == ["1", "a", "b", "2", "3"]


def test_rows_are_cut_in_the_middle_to_fit(data: Path) -> None:
    fitter = Fitter(TOKENIZER, 1200)
    found = list(samples(["qasper", "trec"], str(data), [], 2, 0, fitter))
    assert [s.name for s in found] == ["r0", "r1", "t0"]
    paper, _, question = found
    assert fitter.count(paper) + paper.max_new_tokens == 1200
    assert paper.prompt.startswith("You are given a scientific article")
    assert paper.prompt.endswith("Question: Who wrote?\n\nAnswer:")
    assert "year 299 " in paper.prompt and "year 150 " not in paper.prompt
    assert not paper.raw and question.raw and question.classes == ("Date", "Place")
    assert question.prompt.endswith(
        "examples of questions.\n\nQuestion: a\nType: Place\nWho wrote?"
    )


def test_what_the_chat_format_adds_by_its_options_counts(data: Path) -> None:
    template = f"{{% if not enable_thinking %}}<no thinking>{{% endif %}}{CHAT_TEMPLATE}"
    tokenizer = tiny_tokenizer(chat_template=template)
    added = len("<no thinking>")
    sizes = []
    for options in ({"enable_thinking": True}, {"enable_thinking": False}):
        fitter = Fitter(tokenizer, 1200, options)
        (paper,) = samples(["qasper"], str(data), [], 1, 0, fitter)
        asked = [{"role": "user", "content": paper.prompt}]
        text = tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, **options
        )
        assert len(fitter.encode(text)) == fitter.count(paper) == 1200 - paper.max_new_tokens
        sizes.append(len(paper.prompt))
    assert sizes[0] - sizes[1] == added


def test_characters_that_fall_apart_are_cut_too() -> None:
    fitter = Fitter(TOKENIZER, 100)
    text = (
        "é日" * 40
    )  # 5 bytes a pair: a cut within one leaves replacement characters, 3 bytes each
    for most in range(20, 60):
        assert len(fitter.encode(fitter.cut(text, most))) <= most


def test_a_model_without_a_chat_format_is_asked_for_raw_text(data: Path) -> None:
    fitter = Fitter(tiny_tokenizer(chat_template=None), 2 * LENGTH)
    found = list(samples(["qasper", "passkey"], str(data), [LENGTH], 1, 0, fitter))
    assert [s.raw for s in found] == [True, True]


def test_infinitebench_rows_of_a_folder(tmp_path: Path, fitter: Fitter) -> None:
    row = {"id": 7, "context": "x" * 99, "input": "What is the pass key?", "answer": ["123"]}
    (tmp_path / "passkey.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = samples(["passkey"], str(tmp_path), [LENGTH], 5, 0, fitter)
    assert (read.task, read.name, read.answers) == ("passkey", "row 7", ("123",))
    assert f"\n\n{'x' * 99}\n\nWhat is the pass key?" in read.prompt
    assert infinitebench.FORMS["passkey"].reply_start == read.reply_start


def test_a_number_string_repeats_digits(data: Path, fitter: Fitter) -> None:
    for made in samples(["number_string"], str(data), [LENGTH], 5, 0, fitter):
        assert len(made.answers[0]) == 10 and len(set(made.answers[0])) <= 5


def test_bad_input_is_named(data: Path, fitter: Fitter) -> None:
    assert task_names(["vt", "infinitebench", "vt"]) == ["vt", *SUITES["infinitebench"]]
    assert len(task_names(["longbench"])) == 16
    with pytest.raises(ValueError, match=r"--tasks niah: accepts longbench, ruler, .*fwe"):
        task_names(["niah"])
    with pytest.raises(ValueError, match=r"--lengths: 100: vt accepts \d+ tokens or more"):
        list(samples(["vt"], str(data), [100], 1, 0, fitter))
    with pytest.raises(ValueError, match="--lengths: 99999: accepts up to --max-length=24000"):
        list(samples(["vt"], str(data), [99999], 1, 0, fitter))
    with pytest.raises(ValueError, match="--max-length=140: qasper needs more than"):
        list(samples(["qasper"], str(data), [], 1, 0, Fitter(TOKENIZER, 140)))
    with pytest.raises(PassageError, match=r"--data=.*: lcc accepts a folder with lcc.jsonl"):
        list(samples(["lcc"], str(data), [], 1, 0, fitter))
    with pytest.raises(PassageError, match="--data=None: lcc accepts a folder"):
        list(samples(["lcc"], None, [], 1, 0, fitter))


def test_every_task_counts_the_same_in_a_mean_of_means() -> None:
    found = mean_of_means([[0.0, 0.0, 0.0], [1.0]])
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 4)
    spread = mean_of_means([[0.0, 1.0] * 50, [1.0] * 10])
    assert spread.value == 0.75 and 0.69 < spread.low < 0.72 and 0.78 < spread.high < 0.81
    with pytest.raises(ValueError, match="an empty group"):
        mean_of_means([[1.0], []])


def test_differences_are_of_the_same_samples() -> None:
    def record(task: str, name: str, method: str, score: float) -> dict[str, Any]:
        budget = None if method == "full" else 0.5
        values = {"method": method, "budget": budget, "score": score}
        return {"task": task, "sample": name, **values, "compressed": method != "full"}

    records = [
        *(record("a", str(n), "full", 1.0) for n in range(4)),
        *(record("a", str(n), "lava", n / 4) for n in range(2)),
        *(record("b", "0", method, 0.5) for method in ("full", "lava")),
    ]
    found = cells(records)
    lava = found["a"]["lava", 0.5]
    assert lava.score.value == 12.5 and lava.compressed == 2
    assert lava.difference is not None
    assert lava.difference.value == -87.5 and lava.difference.n == 2
    assert found[AVERAGE]["lava", 0.5].score.value == 31.25
    assert found[AVERAGE]["full", None].score.value == 75
    assert list(cells(records[:6])) == ["a"], "the average of one task is the task"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server([], command=FAKE, log_path=tmp_path / "log", stop_seconds=5) as server:
        yield server


def test_a_run_measures_what_is_missing(
    server: Server,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_tiny_llama(tmp_path / "tiny")
    write_tiny_tokenizer(model)
    path, summary, plot = (tmp_path / name for name in ("run.jsonl", "run.json", "run.png"))
    options = ["--model-path", str(model), "--data", str(data), "--server", server.url]
    options += ["--tasks", "niah_single_1", "qasper", "--lengths", "2000", "--max-length", "3000"]
    options += ["--results", str(path), "--json", str(summary), "--plot", str(plot)]
    options += ["--concurrency", "3", "--budgets", "0.25,64", "--methods", "lava"]
    tasks.main([*options, "--samples", "2"])
    header, *found = [json.loads(line) for line in path.read_text().splitlines()]
    assert "dtype" not in header["settings"], "it is the server's"
    assert len(found) == (2 + 2) * 3
    for record in found:
        assert record["compressed"] == (record["method"] == "lava")
        # The fake server echoes the prompt, needle and all, unless it compressed it.
        if record["task"] != "qasper":
            assert record["score"] == (record["method"] == "full")
    report = json.loads(summary.read_text())
    assert set(report) == {"server", "client_machine", "commit", "summary"}
    assert report["server"] == server.url
    written = {(cell["task"], cell["method"], cell["budget"]): cell for cell in report["summary"]}
    assert written["niah_single_1@2000", "full", None]["score"]["value"] == 100
    assert written["niah_single_1@2000", "lava", 64]["difference"]["value"] == -100
    assert -100 < written[AVERAGE, "lava", 64]["difference"]["value"] < -49
    assert plot.stat().st_size > 0
    shown = capsys.readouterr().out
    assert "niah_single_1@2000" in shown and "-100.0" in shown

    asked: list[Any] = []
    ask = asker.Asker.ask

    async def counted(self: Any, sample: Sample, settings: Any) -> Any:
        asked.append((sample.name, settings))
        return await ask(self, sample, settings)

    monkeypatch.setattr(asker.Asker, "ask", counted)
    tasks.main([*options, "--samples", "2"])
    assert asked == []
    tasks.main([*options, "--samples", "3"])
    assert sorted(name for name, _ in asked) == ["0/2"] * 3 + ["r2"] * 3
    assert asked[0][1] == {"enabled": False}
    with pytest.raises(ValueError, match=r"--methods lava:pool_width=3: accepts lava, "):
        tasks.main([*options, "--methods", "lava:pool_width=3"])
    for unused in ("--device=cpu", "--dtype=float32", "--batch-tokens=64"):
        with pytest.raises(SystemExit):
            tasks.main([*options, unused])
        assert f"unrecognized arguments: {unused}" in capsys.readouterr().err


def test_a_prompt_that_is_not_compressed_is_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    import httpx

    async def reply(self: asker.Asker, path: str, body: dict[str, Any]) -> dict[str, Any]:
        info = {"status": "skipped", "reason": reason}
        return {"text": "", "meta_info": {"prompt_tokens": 9, "kv_compression": info}}

    monkeypatch.setattr(asker.Asker, "_post", reply)
    one = asker.Asker(httpx.AsyncClient(), {})
    reason = "no_room"
    with pytest.raises(RuntimeError, match="task 0: the server did not compress it: no_room"):
        asyncio.run(one.ask(sample("a", raw=True), {"budget": 64}))
    assert asyncio.run(one.ask(sample("a", raw=True), {"enabled": False})).kept_tokens == 9
    reason = "too_short"
    assert not asyncio.run(one.ask(sample("a", raw=True), {"budget": 64})).compressed
