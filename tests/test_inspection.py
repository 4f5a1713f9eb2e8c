"""megatron-multiturn-inspect: what it shows, and that it shows it whole."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from drawn_sessions import draw, segment_index, session_lengths
from numpy.typing import NDArray

from megatron_multiturn import inspection
from megatron_multiturn.averages import LOSS_AVERAGES
from megatron_multiturn.control_tokens import ControlToken
from megatron_multiturn.dataset_statistics import DatasetTurns, dataset_turns, loss_shares
from megatron_multiturn.decoding import RunDecoder
from megatron_multiturn.encoding import EncodedSession, join_encoded
from megatron_multiturn.inspection import main
from megatron_multiturn.manifest import TemplateIdentity
from megatron_multiturn.modes import CONTEXT, LEADING_SYSTEM, MESSAGE_START, TARGET_BEGIN
from megatron_multiturn.row_view import ShownPiece, Style, format_pieces, use_color
from megatron_multiturn.samples import RowFormat
from megatron_multiturn.session_writer import SessionWriter
from megatron_multiturn.store import SessionStore
from megatron_multiturn.targets import target_runs
from megatron_multiturn.vocabulary import TokenizerIdentity, tokenizer_fingerprint

END = 256
SYSTEM = CONTEXT | MESSAGE_START | LEADING_SYSTEM
USER = CONTEXT | MESSAGE_START


class ByteVocabulary:
    """Every byte of UTF-8 is a token; 256 is a special one."""

    size: int = 257
    bos_id: int | None = None
    eos_id: int | None = None
    unknown_id: int | None = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], list[int]]:
        raise NotImplementedError

    def decode_flat(self, ids: NDArray[np.int32]) -> str:
        raise NotImplementedError

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]] | None:
        raise NotImplementedError

    def control_tokens(self) -> list[ControlToken]:
        raise NotImplementedError

    def named_tokens(self) -> dict[str, str]:
        raise NotImplementedError

    def serialized(self) -> bytes:
        raise NotImplementedError

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        return [bytes(each).decode(errors="replace") for each in ids]

    def id_of(self, token: str) -> int | None:
        return END if token == "<end>" else None

    def literal_of(self, token_id: int) -> str:
        assert token_id == END
        return "<end>"


DECODER = RunDecoder(ByteVocabulary(), frozenset({END}))


def session_of(*segments: tuple[int, str]) -> EncodedSession:
    """(mode, text) -> a session of bytes; "|" is the special token."""
    ids = [[END if c == ord("|") else c for c in text.encode()] for _, text in segments]
    return EncodedSession(
        tokens=np.concatenate(ids).astype(np.int32),
        segment_lengths=np.array([len(each) for each in ids], dtype=np.int32),
        modes=np.array([mode for mode, _ in segments], dtype=np.int8),
    )


CHAT = session_of(
    (SYSTEM, "be kind|"), (USER, "你好吗|"), (TARGET_BEGIN, "很好!|"), (USER, "ok\nbye|"),
    (TARGET_BEGIN, "再见|"),
)  # fmt: skip


def show(*pieces: ShownPiece, color: bool = False, average: str = "turn") -> str:
    row_format = RowFormat(
        sequence_length=1000, max_pieces_per_row=9, pad_token=0, loss_average=average
    )
    return format_pieces(pieces, row_format, DECODER, Style(color=color, width=80))


def whole(session: EncodedSession, index: int = 0) -> ShownPiece:
    return ShownPiece(session_index=index, session=session, span=(0, 0, 0, len(session.tokens)))


class TestRunDecoder:
    def test_runs_join_to_the_text(self) -> None:
        ids = list("你好 and 再见".encode())
        for cut in range(len(ids) + 1):
            assert "".join(DECODER.decode_runs(ids, [0, cut, len(ids)])) == "你好 and 再见"

    def test_a_character_cut_by_a_run_comes_with_its_end(self) -> None:
        assert DECODER.decode_runs(list("a好b".encode()), [0, 2, 5]) == ["a", "好b"]

    def test_special_tokens_are_written_out(self) -> None:
        ids = [*b"a", END, *b"b", END, END]
        assert DECODER.decode_runs(ids, [0, 2, 3, 5]) == ["a<end>", "b", "<end><end>"]

    def test_broken_bytes_are_shown_as_such(self) -> None:
        ids = [*"好".encode()[:2], END, *b"x"]
        assert DECODER.decode_runs(ids, [0, 2, 4]) == ["\ufffd", "<end>x"]


class TestPieces:
    def test_text_and_turns(self) -> None:
        lines = show(whole(CHAT, 17)).splitlines()
        assert lines[0].startswith("── piece 1 of 1 ── session 17, all of its 40 tokens ───")
        assert lines[1:7] == [
            "     │ be kind<end>你好吗<end>",
            "   1 ┃ 很好!<end>",
            "     │ ok⏎",
            "     │ bye<end>",
            "   2 ┃ 再见<end>",
            "── turns ".ljust(80, "─"),
        ]
        assert [line.split()[:7] for line in lines[8:]] == [
            ["1", "17", "1", "assistant", "8", "1", "50.0%"],
            ["2", "17", "2", "assistant", "7", "1", "50.0%"],
        ]

    def test_the_weight_is_that_of_the_loss_average(self) -> None:
        table = show(whole(CHAT), average="token").splitlines()[-2:]
        assert [line.split()[5:7] for line in table] == [["8", "53.3%"], ["7", "46.7%"]]
        table = show(whole(CHAT), average="session").splitlines()[-2:]
        assert [line.split()[5] for line in table] == ["0.5", "0.5"]
        table = show(whole(CHAT), average="sqrt").splitlines()[-2:]
        assert [line.split()[5] for line in table] == ["2.828", "2.646"]

    def test_a_turn_of_a_cut_session_keeps_its_weight(self) -> None:
        piece = ShownPiece(session_index=3, session=CHAT, span=(8, 26, 33, 40))
        assert show(piece, average="session").splitlines()[-1].split()[5] == "0.5"

    def test_a_later_window_says_what_it_leaves_out(self) -> None:
        span = (8, 26, 33, 40)
        text = show(ShownPiece(session_index=3, session=CHAT, span=span))
        lines = text.splitlines()
        assert "tokens 26 to 39 of 40 behind its first 8, new from 33" in lines[0]
        assert lines[1:3] == [
            "     │ be kind<end>",
            "     ┆ tokens 8 to 25 are not in this piece",
        ]
        assert lines[-1].split()[1:5] == ["3", "2", "assistant", "7"]

    def test_a_token_that_opens_a_piece_is_context(self) -> None:
        text = show(whole(session_of((TARGET_BEGIN, "abc"))))
        assert text.splitlines()[1:3] == ["     │ a", "   1 ┃ bc"]

    def test_colors_differ_between_turns_and_reset(self) -> None:
        text = show(whole(CHAT), color=True)
        assert "\x1b[2m│ be kind<end>你好吗<end>\x1b[0m" in text
        assert "\x1b[7;32m   1 \x1b[0m\x1b[32m┃ 很好!<end>\x1b[0m" in text
        assert "\x1b[7;33m   2 \x1b[0m\x1b[33m┃ 再见<end>\x1b[0m" in text
        assert re.sub("\x1b\\[[0-9;]*m", "", text) == show(whole(CHAT))

    def test_control_characters_of_a_session_do_not_reach_the_terminal(self) -> None:
        session = session_of((USER, "\x1b[2J\x07\r\x9b"), (TARGET_BEGIN, "\x1b]0;x"))
        text = show(whole(session))
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
        assert "␛[2J␇␍" in text

    def test_no_turn(self) -> None:
        assert show(whole(session_of((USER, "hi")))).endswith("no turn has a target here")

    def test_long_lines_are_wrapped_without_loss(self) -> None:
        words = "many words of a very long answer " * 20
        text = show(whole(session_of((USER, "好" * 200), (TARGET_BEGIN, words))))
        lines = text.splitlines()
        shown = [line[7:] for line in lines if line[5:6] == "┃"]
        assert " ".join(shown).split() == words.split()
        assert max(map(len, shown)) <= 73
        contexts = [line[7:] for line in lines if line[5:6] == "│"]
        assert "".join(contexts) == "好" * 200
        assert max(map(len, contexts)) == 36  # of two columns each


def test_loss_shares_in_closed_form() -> None:
    """Sessions with turns of {1} and {1, 4} targets."""
    shares = loss_shares(
        DatasetTurns(
            tokens_per_session=np.array([2, 7]),
            turns_per_session=np.array([1, 2]),
            targets_per_turn=np.array([1, 1, 4]),
            turn_weights=None,
        )
    )
    assert shares.least_targets.tolist() == [1, 2, 4]
    assert shares.num_turns.tolist() == [2, 0, 1]
    assert shares.num_targets.tolist() == [2, 0, 4]
    expected = {
        "turn": 2 / 3,
        "token": 2 / 6,
        "session": (1 + 1 / 2) / 2,
        "session-token": (1 + 1 / 5) / 2,
        "prefix": (1 + 3 / 2) / 3,
        "sqrt": 2 / 4,
    }
    assert set(expected) == set(LOSS_AVERAGES)
    for average, share in expected.items():
        assert shares.shares[average] == pytest.approx([share, 0, 1 - share])


def test_target_runs_of_a_whole_dataset() -> None:
    sessions = [draw("A|uB.BC"), draw("|uu"), draw("AA|uBB")]
    first_segments, lengths, modes = segment_index(sessions)
    runs = target_runs(np.diff(first_segments), lengths, modes)
    assert runs.session.tolist() == [0, 0, 0, 2, 2]
    assert runs.begin.tolist() == [2, 4, 5, 1, 3]
    assert runs.turn.tolist() == [0, 0, 1, 2, 3]
    assert runs.sum_by_turn(runs.end - runs.begin).tolist() == [2, 1, 1, 2]
    assert session_lengths(sessions).tolist() == [6, 2, 5]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer of single bytes, so that most characters take several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prefix(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 40 sessions, made with that tokenizer."""
    from megatron_multiturn.tokenizer_flags import build_tokenizer
    from megatron_multiturn.vocabulary import open_vocabulary

    args = inspection.build_parser().parse_args(
        [
            "-",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            str(tokenizer_folder),
        ]
    )
    tokenizer = build_tokenizer(args)
    vocabulary = open_vocabulary(tokenizer)
    prefix = str(tmp_path_factory.mktemp("dataset") / "chats")
    with SessionWriter(
        prefix,
        tokenizer=tokenizer_fingerprint(tokenizer, "HuggingFaceTokenizer"),
        template=TemplateIdentity(name="test", content_hash=""),
    ) as writer:
        for number in range(40):
            ids = vocabulary.encode([f"第{number}个问题?", "答案" * (number + 1), "why?", "因为!"])
            session = EncodedSession(
                tokens=np.concatenate(ids).astype(np.int32),
                segment_lengths=np.array([len(each) for each in ids], dtype=np.int32),
                modes=np.array([USER, TARGET_BEGIN] * 2, dtype=np.int8),
            )
            writer.add(join_encoded([session]))
        writer.describe(rejected={"no-assistant": 2}, inputs=[])
    return prefix


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


class TestCommand:
    def test_a_row(
        self, capsys: pytest.CaptureFixture[str], prefix: str, tokenizer_folder: Path
    ) -> None:
        options = ["--tokenizer-model", str(tokenizer_folder), "--seq-length", "512"]
        out = run(capsys, prefix, "--row", "1", *options)
        assert re.match(r"row 1 of \d+: \d+ of 512 positions filled, --loss-average turn\n", out)
        assert "\ufffd" not in out
        assert re.search(r"│ 第\d+个问题\?\n +\d+ ┃ (答案)+", out)
        assert "\x1b" not in out
        assert "\x1b[2m" in run(capsys, prefix, *options, "--color", "always")

    def test_a_session_whole_and_in_windows(
        self, capsys: pytest.CaptureFixture[str], prefix: str, tokenizer_folder: Path
    ) -> None:
        options = ["--session", "39", "--tokenizer-model", str(tokenizer_folder)]
        out = run(capsys, prefix, *options)
        assert "session 39, all of its" in out
        assert "答案" * 36 in out.replace("\n     ┃ ", "")
        out = run(capsys, prefix, *options, "--seq-length", "245")
        assert "piece 2 of 2 ── session 39" in out

    @pytest.mark.parametrize("how", ["window", "truncate", "drop"])
    def test_statistics_count_what_is_cut_and_lost(
        self, capsys: pytest.CaptureFixture[str], prefix: str, how: str
    ) -> None:
        flags = ["--stats", "--seq-length", "50", "--session-window", "40", "--long-session", how]
        out = run(capsys, prefix, *flags)
        counts = {
            name: int(number.replace(",", ""))
            for number, name in re.findall(r"^  ([\d,]+) (.*)$", out, flags=re.MULTILINE)
        }
        store = SessionStore.open(prefix)
        is_long = store.session_lengths() > 41
        turns = dataset_turns(store)
        of_long = int(turns.turns_per_session[is_long].sum())
        assert of_long > 0
        dropped = re.search(
            r"(\d+) longer than the window: (\d+) cut into \d+ pieces, (\d+) d", out
        )
        assert dropped
        assert [int(number) for number in dropped.groups()] == {
            "window": [is_long.sum(), is_long.sum(), 0],
            "truncate": [is_long.sum(), int(dropped[2]), is_long.sum() - int(dropped[2])],
            "drop": [is_long.sum(), 0, is_long.sum()],
        }[how]
        lost = counts.get("turns lost", 0)
        assert {"window": lost == 0, "truncate": lost > 0, "drop": lost == of_long}[how]
        assert (counts.get("target tokens lost", 0) > 0) == (how != "window")

    def test_statistics_need_no_tokenizer(
        self,
        capsys: pytest.CaptureFixture[str],
        prefix: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delattr(inspection, "build_tokenizer")
        out = run(capsys, prefix, "--stats", "--seq-length", "256")
        assert "turns          80, 2.0 a session" in out
        assert "rejected       2 sessions: no-assistant 2" in out
        assert re.search(r"\d+ pieces in \d+ rows", out)
        table = [line.split() for line in out.split("target tokens  ")[-1].splitlines()[1:]]
        assert len(table) > 4
        for column in range(3, 9):  # the shares of each average add up to one
            assert sum(float(row[column].rstrip("%")) for row in table) == pytest.approx(100, abs=1)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (["--row", "0"], "pass --tokenizer-model, or --stats"),
            (["--row", "9999", "--tokenizer-model", "x"], r"--row is 9999.*pass 0 to \d+"),
            (["--session", "40", "--tokenizer-model", "x"], "--session is 40.*40 sessions"),
            (["--session", "-1", "--tokenizer-model", "x"], "--session is -1"),
            (["--stats", "--seq-length", "0"], "--seq-length is 0"),
            (["--stats", "--seq-length", "16", "--long-session", "error"], "session 0 has"),
            (["--stats", "--window-context", "2"], "--window-context"),
            (["--session", "39", "--seq-length", "8", "--long-session", "drop",
              "--tokenizer-model", "x"], "no piece comes of session 39"),
            (["--row", "0", "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", "x.model"],
             "x.model: no such file"),
        ],
    )  # fmt: skip
    def test_errors_are_one_line(
        self, capsys: pytest.CaptureFixture[str], prefix: str, options: list[str], match: str
    ) -> None:
        assert main([prefix, *options]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(rf"error: .*{match}.*\n", captured.err)

    def test_no_dataset(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main([str(tmp_path / "none"), "--stats"]) == 1
        assert re.fullmatch(r"error: .*none\.json: no manifest.*\n", capsys.readouterr().err)

    def test_another_tokenizer_is_refused(
        self,
        capsys: pytest.CaptureFixture[str],
        prefix: str,
        tokenizer_folder: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        other = TokenizerIdentity(type="HuggingFaceTokenizer", vocab_size=9, content_hash="other")
        monkeypatch.setattr(inspection, "tokenizer_fingerprint", lambda *_: other)
        assert main([prefix, "--tokenizer-model", str(tokenizer_folder)]) == 1
        assert "was made with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "is_terminal", "environment", "expected"),
    [
        ("always", False, {"NO_COLOR": "1"}, True),
        ("never", True, {}, False),
        ("auto", True, {}, True),
        ("auto", False, {}, False),
        ("auto", True, {"NO_COLOR": "1"}, False),
        ("auto", True, {"TERM": "dumb"}, False),
    ],
)
def test_when_to_color(
    choice: str,
    is_terminal: bool,
    environment: dict[str, str],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert use_color(choice, is_terminal=is_terminal) == expected


def test_a_pager_that_quits_is_no_error(prefix: str, repository: Path) -> None:
    shell = shutil.which("sh")
    assert shell
    command = f'"{sys.executable}" -m megatron_multiturn.inspection "{prefix}" --stats | true'
    done = subprocess.run(
        [shell, "-c", command], capture_output=True, text=True, cwd=repository, check=False
    )
    assert done.stderr == ""


def test_the_shell_in_tools_runs_the_command(prefix: str, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, repository / "tools" / "inspect_dataset.py", prefix, "--stats"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
        check=True,
    )
    assert "sessions       40" in done.stdout
