"""benchmarks/preprocess.py: its corpora, how it times a command, and small runs of the whole."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from session_fixtures import tiny_hugging_face, tiny_sentencepiece, write_jsonl

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import preprocess
import preprocess_variants
from chat_corpus import Messages, grow, join_sessions, read_sessions, write_corpus
from preprocess_variants import Measured, TokenizerChoice, our_tool, stock_tool
from raw_encoding import LIBRARIES
from stamped_runs import CommandError, Line, StampedRun, run_stamped

# What Megatron's tool says: it takes half a second to start and one for the second document.
STOCK_TOOL = """
import sys, time
assert sys.argv[sys.argv.index("--log-interval") + 1] == "1", sys.argv
time.sleep(0.5)
print("Time to startup: 0.5")
print("Processed 1 documents (2 docs/s, 1 MB/s).", file=sys.stderr)
time.sleep(1.0)
print("Processed 2 documents (2 docs/s, 1 MB/s).", file=sys.stderr)
"""


def session(*texts: str, system: str = "") -> Messages:
    """A session of questions and answers in turn."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def texts_of(messages: Messages) -> list[str]:
    return [message["content"] for message in messages]


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def test_sessions_without_text_are_left_out(tmp_path: Path) -> None:
    kept, empty = session("你好", "hello"), session("q", " ")
    records = [{"messages": messages, "id": 3} for messages in (empty, kept)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    assert read_sessions([path, path]) == [kept, kept]


def test_short_sessions_are_joined() -> None:
    one = session("q1", "a1", "q2", "a2", system="s1")
    other = session("q3", "a3", system="s2")
    assert join_sessions([one, other, other, one], min_turns=3) == [
        session("q1", "a1", "q2", "a2", "q3", "a3", system="s1"),
        session("q3", "a3", "q1", "a1", "q2", "a2", system="s2"),
    ]
    assert join_sessions([one, other], min_turns=4) == []


def test_copies_are_changed_by_a_unit_a_clause() -> None:
    original = session(
        "Where is the big dog, and why?", "它在院子里。你看不见它吗？", system="1 2 3"
    )
    assert next(grow([original])) == original
    copies = list(islice(grow([original]), 1, 9))
    assert copies == list(islice(grow([original]), 1, 9))  # the same for the same sessions
    for copy in copies:
        assert [message["role"] for message in copy] == ["system", "user", "assistant"]
        assert copy[0]["content"] == "1 2 3"  # there is nothing to exchange
        assert all(text.strip() for text in texts_of(copy))
    english = {copy[1]["content"] for copy in copies}
    assert any(re.fullmatch(r"Where is \w+ big dog, and \w+\?", text) for text in english)
    assert any(re.fullmatch(r"and \w+\?Where is \w+ big dog, ", text) for text in english)
    assert len(english) > 1
    chinese = {copy[2]["content"] for copy in copies}
    assert all(
        re.fullmatch(r"它在.子里。你看不.它吗？|你看不.它吗？它在.子里。", t) for t in chinese
    )
    assert len(chinese) > 1


def test_a_corpus_is_written_for_both_tools(tmp_path: Path) -> None:
    sessions = [session("你好", "b"), session("cc", "dd")]
    corpus = write_corpus(tmp_path / "whole", sessions, 0)
    assert corpus.text_bytes == (7, 4)
    assert read_sessions([str(corpus.sessions)]) == sessions
    joined = [json.loads(line)["text"] for line in corpus.joined.read_text().splitlines()]
    assert joined == ["你好\nb", "cc\ndd"]
    grown = write_corpus(tmp_path / "grown", sessions, 12)
    assert len(grown.text_bytes) == 3
    assert 12 <= grown.num_bytes == 11 + grown.text_bytes[2]
    assert write_corpus(tmp_path / "cut", sessions, 5).text_bytes == (7,)


def test_lines_are_stamped_and_memory_is_watched() -> None:
    ran = run_stamped(
        python(
            "import sys, time; print('one'); time.sleep(0.5); held = bytearray(3 * 10**8)\n"
            "print('two', file=sys.stderr); time.sleep(0.7); print(' three')"
        ),
        memory=True,
    )
    assert [line.text for line in ran.lines] == ["one", "two", " three"]
    one, two, three = (line.seconds for line in ran.lines)
    assert two - one >= 0.45
    assert three - two >= 0.65
    assert ran.seconds >= three
    assert ran.first_of_stderr() == two
    found = ran.first("three")
    assert found is not None
    assert found.seconds == three
    assert 3e8 < ran.peak_bytes < 4e8
    assert ran.peak_bytes <= ran.peak_rss


def test_a_command_that_fails_is_an_error() -> None:
    with pytest.raises(CommandError, match="exit status 3\nso it goes"):
        run_stamped(python("print('so it goes'); raise SystemExit(3)"))


def test_documents_before_the_first_line_do_not_count(tmp_path: Path) -> None:
    """2 sessions, of which the first is done when the clock begins: the second takes a second."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "preprocess_data.py").write_text(STOCK_TOOL)
    corpus = write_corpus(tmp_path / "corpus", [session("q" * 999, "a"), session("q" * 3, "a")], 0)
    choice = TokenizerChoice(model="nothing", template="chatml")
    measured = stock_tool(corpus, choice, tmp_path, tmp_path)["megatron"]
    assert 0.9 < measured.work_seconds < 2
    assert measured.mb_per_second == pytest.approx(4 / 1e6 / measured.work_seconds)
    assert measured.start_seconds is not None
    assert measured.start_seconds >= 0.5


@pytest.mark.parametrize("make_model", [tiny_hugging_face, tiny_sentencepiece])
def test_libraries_encode_all_texts(make_model: Callable[[], str]) -> None:
    """Or the one would be measured on less than the other."""
    choice = TokenizerChoice(model=make_model(), template="chatml")
    texts = ["你好，world", "b" * 50, "user assistant", "What is the tallest?"]
    ours, theirs = (LIBRARIES[name](choice.model) for name in ("gigatoken", choice.library))
    counts = [theirs([text])() for text in texts]
    assert min(counts) > 0
    assert ours(texts)() == theirs(texts)() == sum(counts)


def tool_that_says(
    monkeypatch: pytest.MonkeyPatch, lines: Sequence[tuple[float, str]], seconds: float
) -> None:
    said = tuple(
        Line(seconds=at, is_error=text.startswith("preprocess"), text=text) for at, text in lines
    )
    ran = StampedRun(seconds=seconds, lines=said, peak_bytes=0, peak_rss=0)
    monkeypatch.setattr(preprocess_variants, "run_stamped", lambda *_, **__: ran)


TABLE = [
    (20.0, "  kept      2 sessions, 2 turns"),
    (20.1, "  tokens    3,000, targets 1,000 (33.3%)"),
    (20.2, "  speed     12.0 s, 0 sessions/s, 0.0 MB/s, 250 tokens/s"),
]


@pytest.mark.parametrize(
    ("engine", "lines", "began"),
    [
        ("gigatoken", [(5.0, "preprocess: encoding with gigatoken, equal to the")], 5.0),
        ("reference", [], 8.0),
    ],
)
def test_when_our_tool_begins_to_work(
    engine: str,
    lines: list[tuple[float, str]],
    began: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = write_corpus(tmp_path / "corpus", [session("q" * 999, "a")] * 2, 0)
    choice = TokenizerChoice(model="nothing", template="chatml")
    first = (0.5, "preprocess: 1 file, 3 bytes; loading the tokenizer")
    tool_that_says(monkeypatch, [first, *lines, *TABLE], 21.0)
    measured, _ = our_tool(corpus, choice, engine, tmp_path)
    assert measured.start_seconds == pytest.approx(began)
    assert measured.work_seconds == pytest.approx(21 - began)
    assert measured.mb_per_second == pytest.approx(2000 / 1e6 / (21 - began))
    assert measured.wall_seconds == 21
    assert measured.first_line_seconds == 0.5


def test_a_tool_that_leaves_sessions_out_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus", [session("q", "a")] * 3, 0)
    choice = TokenizerChoice(model="nothing", template="chatml")
    tool_that_says(monkeypatch, TABLE, 21.0)
    with pytest.raises(CommandError, match="2 of 3 sessions were kept"):
        our_tool(corpus, choice, "gigatoken", tmp_path)


def measured(speed: float, wall: float | None = None) -> Measured:
    return Measured(
        mb_per_second=speed,
        work_seconds=100 / speed,
        start_seconds=None if wall is None else wall - 100 / speed,
        wall_seconds=wall,
        first_line_seconds=None if wall is None else 0.25,
    )


def test_ratios_are_of_a_round_and_of_the_best() -> None:
    rounds = [
        {"a": measured(10, 12), "b": measured(5, 36), "c": measured(20)},
        {"a": measured(8, 18), "b": measured(2, 60), "c": measured(40)},
    ]
    lines = preprocess.ratio_lines([("a", "b"), ("a", "c"), ("a", "absent")], rounds)
    assert lines[2:] == [
        "| a | b | **2.00** | 2.00, 4.00 | 3.00 |",
        "| a | c | **0.25** | 0.50, 0.20 |  |",
    ]
    assert preprocess.best_lines(rounds)[2:] == [
        "| a | 10.0 | 10.00 | 2.00 | 12.00 | 0.25 |",
        "| b | 5.0 | 20.00 | 10.00 | 36.00 | 0.25 |",
        "| c | 40.0 | 2.50 |  |  |  |",
    ]


def test_variants_take_turns_at_being_first() -> None:
    order: list[str] = []

    def variant(name: str) -> Any:
        def run() -> dict[str, Measured]:
            order.append(name)
            return {name: measured(len(order))}

        return run

    rounds = preprocess.measure([variant("a"), variant("b")], 2)
    assert order == ["a", "b", "b", "a"]
    assert [round_["a"].mb_per_second for round_ in rounds] == [1, 4]


def test_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fast and slow, with a tiny tokenizer, on a made-up corpus."""
    flags = ["--sentencepiece", tiny_sentencepiece(), "--sections", "fast", "--rounds", "1"]
    preprocess.main([*flags, "--sessions", "40", "--folder", str(tmp_path)])
    out = capsys.readouterr().out
    sizes = re.search(r"fast, SentencePiece, firefly: (\d+) sessions, 0\.0 MB of text", out)
    assert sizes is not None
    assert 5 < int(sizes[1]) < 40
    assert re.search(r"\| ours, gigatoken \| gigatoken, cold \| \*\*\d+\.\d\d\*\*", out)
    assert re.search(r"\| ours, gigatoken \| \d+\.\d \| \d+\.\d\d \| \d+\.\d\d \| \d", out)
    assert "| megatron" not in out
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preprocess.main([])
    assert "pass --bpe or --sentencepiece" in capsys.readouterr().err
