"""The demo corpus, the quickstart's tokenizer, and what is read out of Megatron's log."""

import itertools
import json
import re
from pathlib import Path

import pytest
import sentencepiece

from megatron_multiturn import preprocess
from megatron_multiturn.demo import main, train_tokenizer, write_corpus
from megatron_multiturn.demo_corpus import NAMES, demo_sessions
from megatron_multiturn.demo_report import Evaluation, Iteration, read_log_line, summarize
from megatron_multiturn.errors import DatasetError, SessionError
from megatron_multiturn.packing import pack
from megatron_multiturn.plan_cache import PlanKey, cached_plan
from megatron_multiturn.sessions import Session, read_sessions
from megatron_multiturn.store import SessionStore
from megatron_multiturn.windows import cut_sessions

ITERATION = (
    " [2026-01-02 00:34:14.300597] iteration       {number}/     100 | consumed samples:  {rows} | "
    "elapsed time per iteration (ms): 169.8 | learning rate: 6.864507E-04 | global batch size:    "
    "16 | lm loss: {loss}E-01 | token loss: 4.67E-01 | loss scale: 1.0 | grad norm: 0.287 |"
)
EVALUATION = (
    " validation loss at iteration 100 on validation set | lm loss value: 4.05E-01 | lm loss PPL: "
    "1.49E+00 | token loss value: 3.91E-01 | token loss PPL: 1.47E+00 | "
)


def test_the_corpus_is_the_same_every_time() -> None:
    first, again = (list(demo_sessions(20, seed=3)) for _ in range(2))
    assert first == again
    assert list(demo_sessions(10, seed=3)) == first[:10]
    assert list(demo_sessions(20, seed=4)) != first


def test_the_corpus_is_read_without_a_rejected_session(tmp_path: Path) -> None:
    write_corpus(tmp_path / "demo.jsonl", 300, seed=0)
    sessions = list(read_sessions([str(tmp_path / "demo.jsonl")]))
    assert len(sessions) == 300
    messages = [m for s in sessions if isinstance(s, Session) for m in s.messages]
    assert {m.role for m in messages} == {"system", "user", "assistant"}
    assert 10 < sum(m.train is False for m in messages) < len(messages) / 20


def test_later_answers_need_earlier_turns() -> None:
    """Names that are asked for were told turns before; counts add up over the session."""
    num_names = num_counts = 0
    for session in demo_sessions(300, seed=1):
        name = None
        counts: dict[str, int] = {}
        for question, answer in itertools.pairwise(session["messages"]):
            if question["role"] != "user":
                continue
            told = re.fullmatch(r"(?:My name is|I am|Please call me) (\w+)\.", question["content"])
            changed = re.fullmatch(r"I (buy|use up) (\d+) (\w+)\.", question["content"])
            asked = re.fullmatch(r"How many (\w+) do I have\?", question["content"])
            if told:
                name = told[1]
                assert name in NAMES
            elif changed:
                sign = 1 if changed[1] == "buy" else -1
                counts[changed[3]] = counts.get(changed[3], 0) + sign * int(changed[2])
                assert str(counts[changed[3]]) in answer["content"]
            elif asked and answer.get("train", True):
                assert str(counts[asked[1]]) in answer["content"]
                num_counts += 1
            elif question["content"] == "What is my name?":
                assert name is not None
                assert name in answer["content"]
                num_names += 1
    assert min(num_names, num_counts) > 50


def session_line(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("hi", "ok"),
        ("请问 你好吗？\n\n  第二行", "很好。👍🏽 1234\ttab"),
        ("x" * 9000, "a" + "长" * 5000),
    ],
)
def test_the_tokenizer_adapts_to_little_text(tmp_path: Path, question: str, answer: str) -> None:
    (tmp_path / "few.jsonl").write_text(session_line(question, answer), encoding="utf-8")
    prefix = str(tmp_path / "tokenizer")
    size = train_tokenizer([str(tmp_path / "few.jsonl")], prefix, max_vocab_size=2000)
    processor = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    assert size == processor.vocab_size() <= 2000
    for text in (question, answer, "a text of other characters: é 龍"):
        assert processor.decode(processor.encode(text)) == text
    for symbol in ("<s>", "</s>", "<|im_start|>", "<|im_end|>"):
        token = processor.piece_to_id(symbol)
        assert processor.is_control(token)
        assert token not in processor.encode(f"a text with {symbol} in it")


def test_the_tokenizer_of_no_session_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("not JSON\n")
    with pytest.raises(SessionError, match=r"bad\.jsonl:1: not JSON"):
        train_tokenizer([str(tmp_path / "bad.jsonl")], str(tmp_path / "t"), max_vocab_size=300)
    assert list(tmp_path.glob("t.*")) == []


def test_log_lines() -> None:
    iteration = read_log_line(ITERATION.format(number=70, rows=1120, loss=4.5))
    assert iteration == Iteration(
        number=70,
        of=100,
        consumed_rows=1120,
        milliseconds=169.8,
        turn_loss=0.45,
        token_loss=0.467,
    )
    assert read_log_line(EVALUATION) == Evaluation(
        where="iteration 100 on validation set", turn_loss=0.405, token_loss=0.391
    )
    assert read_log_line(ITERATION.format(number=7, rows=1, loss=0).replace("0E-01", "nan"))
    assert read_log_line("saving checkpoint at iteration 100") is None


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """The prefix of a preprocessed demo corpus."""
    prefix = str(tmp_path / "data")
    main(["corpus", "--output", f"{prefix}.jsonl", "--sessions", "60"])
    main(["tokenizer", "--input", f"{prefix}.jsonl", "--output-prefix", prefix])
    files = ["--input", f"{prefix}.jsonl", "--output-prefix", prefix, "--template", "firefly"]
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    status = preprocess.main([*files, *tokenizer, f"{prefix}.model", "--workers", "1"])
    assert status == 0
    return prefix


@pytest.mark.parametrize("window", [None, 40])
def test_summary(dataset: str, tmp_path: Path, window: int | None) -> None:
    store = SessionStore.open(dataset)
    key = PlanKey(
        dataset_hash="of the dataset",
        sessions=(0, store.num_sessions),
        num_samples=10,
        seed=1,
        sequence_length=256,
        piece_multiple=1,
        long_session="window",
        session_window=window,
        window_context=0.25,
    )
    pieces, report = cut_sessions(
        store.session_lengths(),
        sequence_length=256,
        long_session="window",
        segment_index=store.segment_index(),
        session_window=window,
        window_context=10,
    )
    plan = pack(pieces, sequence_length=256, seed=1)
    cached_plan(tmp_path / "plans", key, lambda: (plan, report))
    log = tmp_path / "train.log"
    log.write_text(
        "noise\n"
        + ITERATION.format(number=10, rows=1, loss=9.1)
        + "\n"
        + ITERATION.format(number=100, rows=plan.num_rows, loss=4.5)
        + "\n"
        + EVALUATION
    )
    summary = summarize(log, data_prefix=dataset, cache=tmp_path / "plans")
    assert re.search(r"lm loss \(turn mean\) +0\.910 +0\.450", summary)
    assert re.search(r"held-out lm loss +0\.405", summary)
    assert f"{plan.stats.fill:.1%} of the positions filled" in summary
    # One epoch has every turn once; windows repeat some context.
    counts = store.manifest.counts
    assert f" {counts.turns:,} turns," in summary
    assert (f" {counts.tokens:,} tokens," in summary) == (window is None)


def test_summary_without_an_iteration(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("Traceback\n")
    with pytest.raises(DatasetError, match="holds no logged iteration"):
        summarize(tmp_path / "train.log", data_prefix="unused", cache=tmp_path)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["tokenizer", "--input", str(tmp_path / "none"), "--output-prefix", "unused"])
    assert exit_info.value.code == 1
    assert "no such file" in capsys.readouterr().err
