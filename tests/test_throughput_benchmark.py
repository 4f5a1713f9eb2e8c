"""benchmarks/train_throughput.py: what its variants train on, and where its numbers come from."""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.utils import Split

from megatron_multiturn import cpu
from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig
from megatron_multiturn.encoding import EncodedSession
from megatron_multiturn.errors import ConfigError, DatasetError
from megatron_multiturn.modes import CONTEXT, TARGET_BEGIN, TARGET_CONTINUE
from megatron_multiturn.store import SessionStore

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from session_lengths import (
    draw_sessions,
    format_lengths,
    known_lengths,
    read_lengths,
    split_by_turn,
)
from step_recorder import StepRecorder
from throughput_data import (
    Datasets,
    EpochCounts,
    epoch_counts,
    mean_session_positions,
    write_datasets,
)
from throughput_flags import build_parser, check_flags, command_of, row_sizes
from throughput_jobs import JobError, run_in_turn
from throughput_table import Bounds, Measures, measures_of, ratio_lines, ratios, table_lines
from train_throughput import main

ROOT = Path(__file__).resolve().parent.parent
SEQUENCE_LENGTH = 64
VOCAB_SIZE = 60_000


def lengths_file(folder: Path, *lines: str) -> Path:
    path = folder / "lengths.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def numbered(sessions: Sequence[EncodedSession]) -> list[EncodedSession]:
    """The same sessions with tokens 1, 2, 3, ..., so that each is found again."""
    made, first = [], 1
    for session in sessions:
        tokens = np.arange(first, first + len(session.tokens), dtype=np.int32)
        first += len(tokens)
        made.append(
            EncodedSession(
                tokens=tokens, segment_lengths=session.segment_lengths, modes=session.modes
            )
        )
    assert first < VOCAB_SIZE
    return made


def targets_of(session: EncodedSession) -> list[int]:
    """The token ids that are targets; the first token of a session is none."""
    kinds = np.repeat(session.modes & 0b11, session.segment_lengths)
    kinds[0] = CONTEXT
    return session.tokens[kinds != CONTEXT].tolist()


# One that fits no row of 64, one of a turn in two targets, one that opens with a target.
LINES = ["30 9 7 12 11 20 8", "9 4 3 +6 2 5 1", "0 3 4 5", "0 1 4 5", "40 21 5 6 7 8 9 12 3 4"]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> list[EncodedSession]:
    path = lengths_file(tmp_path_factory.mktemp("lengths"), *LINES * 3)
    return numbered(list(draw_sessions(read_lengths(path), vocab_size=VOCAB_SIZE, seed=0)))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, sessions: list[EncodedSession]) -> Datasets:
    return write_datasets(
        tmp_path_factory.mktemp("data"),
        sessions,
        vocab_size=VOCAB_SIZE,
        stock_row_length=SEQUENCE_LENGTH,
        num_stock_rows=10,
        seed=0,
    )


def rows_of(prefix: str, cache: Path, piece_multiple: int) -> list[dict[str, Any]]:
    """One epoch, as training reads it."""
    config = MultiTurnDatasetConfig(
        random_seed=5,
        sequence_length=SEQUENCE_LENGTH,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=str(cache),
        piece_multiple=piece_multiple,
    )
    store = MultiTurnDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(store.num_sessions, dtype=np.int32)
    rows = MultiTurnDataset(store, prefix, indices, None, Split.train, config)
    return [rows[index] for index in range(len(rows))]


def trained_targets(rows: Sequence[dict[str, Any]]) -> list[int]:
    return sorted(int(token) for row in rows for token in row["labels"][row["loss_mask"] > 0])


class TestLengths:
    def test_a_line_is_a_session(self, tmp_path: Path) -> None:
        path = lengths_file(tmp_path, "# of nothing", "", "40 12 30 +25 8", "0 5 2 3")
        first, second = read_lengths(path)
        assert first[0].tolist() == [40, 12, 30, 25, 8]
        kinds = [CONTEXT, TARGET_BEGIN, CONTEXT, TARGET_CONTINUE, CONTEXT]
        assert (first[1] & 0b11).tolist() == kinds
        assert second[0].tolist() == [5, 2, 3]
        lines = [
            format_lengths(session)
            for session in draw_sessions([first, second], vocab_size=9, seed=0)
        ]
        assert lines == ["40 12 30 +25 8", "0 5 2 3"]

    def test_context_in_a_row_is_one_context(self) -> None:
        session = EncodedSession(
            tokens=np.zeros(10, dtype=np.int32),
            segment_lengths=np.array([2, 3, 4, 1], dtype=np.int32),
            modes=np.array([12, 4, TARGET_BEGIN, CONTEXT], dtype=np.int8),
        )
        assert format_lengths(session) == "5 4 1"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("3 x", r"lengths.txt:2: 'x' is no length of a target"),
            ("3.5 4", r"lengths.txt:2: '3.5' is no length of a context"),
            ("-3 4", r"'-3' is no length of a context"),
            ("+3 4", r"'\+3' is no length of a context"),
            ("3 +4", r"'\+4' goes on with a turn, and none has begun"),
            ("3 0", r"only the context that opens a session may be 0"),
            ("7", r"a session needs a target"),
            ("0 1", r"a session needs a target and two tokens"),
        ],
    )
    def test_what_is_no_session(self, tmp_path: Path, line: str, message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            read_lengths(lengths_file(tmp_path, "1 2", line))

    def test_files_without_sessions(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="holds no session"):
            read_lengths(lengths_file(tmp_path, "# 1 2"))
        with pytest.raises(DatasetError, match=r"nowhere.*a lengths file, or one of sgd, smile"):
            read_lengths(tmp_path / "nowhere")

    @pytest.mark.parametrize(("name", "mean"), [("smile", 591), ("sgd", 1305)])
    def test_those_that_come_along(self, name: str, mean: int) -> None:
        found = read_lengths(known_lengths()[name])
        assert len(found) == 1000
        # The means of the whole data sets.
        assert np.mean([lengths.sum() for lengths, _ in found]) == pytest.approx(mean, rel=0.02)
        header = known_lengths()[name].read_text().split("\n")[:4]
        assert f"--write-lengths {name} --sessions 1000 --seed 0" in header[3]

    def test_written_from_a_dataset(
        self, datasets: Datasets, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--write-lengths", datasets.sessions, "--seed", "3"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sorted(line for line in lines if line[0] != "#") == sorted(LINES * 3)
        main(["--write-lengths", datasets.sessions, "--seed", "3", "--sessions", "4"])
        few = capsys.readouterr().out.splitlines()
        assert few[4:] == lines[4:8]
        assert lines[4:] != LINES * 3


class TestData:
    def test_a_split_sample_trains_one_turn(self, sessions: list[EncodedSession]) -> None:
        for session in sessions:
            samples = list(split_by_turn(session))
            found = [token for sample in samples for token in targets_of(sample)]
            assert found == targets_of(session)
            for sample in samples:
                assert sample.tokens.tolist() == session.tokens[: len(sample.tokens)].tolist()
                assert sample.tokens[-1] == targets_of(sample)[-1]
                assert (sample.modes & 0b11).tolist().count(TARGET_BEGIN) == 1
        counts = [len(list(split_by_turn(session))) for session in sessions[: len(LINES)]]
        assert counts == [3, 2, 2, 1, 5]
        two_targets = next(iter(split_by_turn(sessions[1])))
        assert (two_targets.modes & 0b11).tolist() == [0, 1, 0, 2]

    def test_every_turn_is_a_target_once(
        self, tmp_path: Path, sessions: list[EncodedSession], datasets: Datasets
    ) -> None:
        expected = sorted(token for session in sessions for token in targets_of(session))
        num_turns = SessionStore.open(datasets.sessions).manifest.counts.turns
        packed = rows_of(datasets.sessions, tmp_path, 1)
        padded = rows_of(datasets.sessions, tmp_path, SEQUENCE_LENGTH)
        split = rows_of(datasets.split, tmp_path, SEQUENCE_LENGTH)
        for rows in (packed, padded, split):
            assert trained_targets(rows) == expected
            assert sum(int(row["turn_num"][0]) for row in rows) == num_turns
        assert len(packed) < len(padded) < len(split) == num_turns
        assert all(int(row["turn_num"][0]) == 1 for row in split)

    def test_a_padded_row_is_one_piece(self, tmp_path: Path, datasets: Datasets) -> None:
        for prefix in (datasets.sessions, datasets.split):
            for row in rows_of(prefix, tmp_path, SEQUENCE_LENGTH):
                assert set(row["cu_seqlens"].tolist()) == {0, SEQUENCE_LENGTH}
                real = ~row["padding_mask"]
                used = int(real.sum())
                assert real[:used].all()
                assert row["loss_mask"][used:].sum() == 0
        packed = rows_of(datasets.sessions, tmp_path, 1)
        assert any(len(set(row["cu_seqlens"].tolist())) > 3 for row in packed)

    def test_an_epoch_is_counted_as_it_is_trained(self, tmp_path: Path, datasets: Datasets) -> None:
        for prefix, one_piece in ((datasets.sessions, False), (datasets.split, True)):
            rows = rows_of(prefix, tmp_path, SEQUENCE_LENGTH if one_piece else 1)
            counts = epoch_counts(
                prefix,
                sequence_length=SEQUENCE_LENGTH,
                long_session="window",
                one_piece_a_row=one_piece,
            )
            assert counts.rows == len(rows)
            assert counts.positions == sum(len(row["tokens"]) for row in rows)
            assert counts.targets == sum(int(row["loss_mask"].sum()) for row in rows)
        dropped = epoch_counts(
            datasets.sessions,
            sequence_length=SEQUENCE_LENGTH,
            long_session="drop",
            one_piece_a_row=True,
        )
        assert dropped.rows == 9  # two of five sessions are longer than a row
        assert dropped.targets == 3 * (4 + 6 + 5 + 2 + 5 + 5)

    def test_the_stock_documents_are_longer_than_a_row(self, datasets: Datasets) -> None:
        lengths = SessionStore.open(datasets.stock).session_lengths()
        assert lengths.min() > SEQUENCE_LENGTH
        assert lengths.sum() > 10 * SEQUENCE_LENGTH

    def test_the_mean_session(self, datasets: Datasets, sessions: list[EncodedSession]) -> None:
        mean = np.mean([len(session.tokens) - 1 for session in sessions])
        assert mean_session_positions(datasets.sessions) == pytest.approx(mean)


def record_of(seconds: Sequence[float], targets: Sequence[int], **overrides: Any) -> dict[str, Any]:
    """What a run of steps of 1,000 positions would have written."""
    steps = [
        {
            "seconds": step,
            "positions": 1000,
            "targets": count,
            "device": {"data": 0.0, "batch": 0.01 * step, "loss": 0.02 * step, "rest": 0.97 * step},
            "host": {"data": 0.05 * step, "batch": 0.1 * step, "loss": 0.0, "rest": 0.85 * step},
        }
        for step, count in zip(seconds, targets, strict=True)
    ]
    record = {
        "steps": steps,
        "flops_per_step": 6e12,
        "flops_per_step_in_pieces": 3e12,
        "peak_memory_bytes": 10,
    }
    return record | overrides


class TestNumbers:
    def test_they_come_from_the_steps(self) -> None:
        epoch = EpochCounts(rows=7, positions=7000, targets=2100)
        found = measures_of(record_of([2.0, 9.0, 1.0], [100, 300, 500]), epoch)
        assert found.step_seconds == 2.0
        assert found.tokens_per_second == 500
        assert found.target_tokens_per_second == 150
        assert found.epoch_target_tokens_per_second == pytest.approx(500 * 0.3)
        assert found.flops_per_second == 3e12
        assert found.flops_per_second_in_pieces == 1.5e12
        assert found.data_share == pytest.approx(0.05)
        assert found.batch_and_loss_share == pytest.approx(0.03)
        assert found.batch_and_loss_host_share == pytest.approx(0.1)
        assert found.step_spread == 4.0

    def test_stock_rows_have_no_targets(self) -> None:
        found = measures_of(record_of([1.0], [1000]), None)
        assert found.target_tokens_per_second is None
        assert "-" in table_lines([(64, "stock", found)], 1e12)[1].split()

    def test_ratios_of_what_was_measured(self) -> None:
        epochs = {"packed": 400, "padded": 100, "split": 20}
        measures = {
            name: measures_of(
                record_of([1.0 + 0.25 * (name == "packed")], [count + 5]),
                EpochCounts(rows=1, positions=1000, targets=count),
            )
            for name, count in epochs.items()
        }
        measures["stock"] = measures_of(record_of([1.0], [1000], peak_memory_bytes=8), None)
        bounds = Bounds(padded=4.0, split=20.0)
        found = ratios(measures, bounds)
        assert found["packed / stock, tokens/s"] == pytest.approx(1 / 1.25)
        assert found["packed / stock, peak memory"] == pytest.approx(10 / 8)
        rows = found["packed / padded, target tokens/s, rows trained"]
        assert rows == pytest.approx(405 / 105 / 1.25)
        assert found["packed / split, target tokens/s, whole epoch"] == pytest.approx(20 / 1.25)
        assert found["packed / split, target tokens/s, of bound"] == pytest.approx(1 / 1.25)
        assert "= 4.00" in "\n".join(ratio_lines(64, found, bounds))
        del measures["stock"], measures["split"]
        assert all("padded" in name for name in ratios(measures, bounds))
        del measures["packed"]
        assert ratios(measures, bounds) == {}


class TestRecorder:
    def test_phases_and_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock()
        monkeypatch.setattr(time, "perf_counter", clock.read)
        monkeypatch.setattr(torch.cuda, "Event", cpu._Event)  # reads the same clock
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        recorder = StepRecorder(2, lambda: clock.advance(1000))
        model = torch.nn.Linear(1, 1)
        model.register_forward_hook(lambda *_: clock.advance(100))
        step = recorder.wrap(functools.partial(fake_train_step, clock))
        for _ in range(5):
            step(fake_forward_step(clock), fake_rows(clock), model)
            clock.advance(7)  # what Megatron does between steps
        assert recorder.num_parameters == 2
        expected = {"data": 2 * 20.0, "batch": 2 * 11.0, "loss": 2 * 33.0, "rest": 2 * 140.0}
        assert recorder.measured_steps() == 3 * [
            {
                "seconds": 7 + sum(expected.values()),
                "positions": 2 * 2 * 8,
                "targets": 2 * 5,
                "piece_squares": 2 * (9 + 25 + 64),  # pieces of 3 and 5, and one of 8
                "device": expected,
                "host": expected,
            }
        ]


class Clock:
    """Goes on only when told to."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


def fake_rows(clock: Clock) -> Iterator[dict[str, torch.Tensor]]:
    mask = torch.zeros(2, 8)
    mask[0, 2:7] = 1
    bounds = torch.tensor([[0, 3, 8, 8], [0, 8, 8, 8]], dtype=torch.int32)
    while True:
        clock.advance(20)
        yield {"tokens": torch.zeros(2, 8), "loss_mask": mask, "cu_seqlens": bounds}


def fake_forward_step(clock: Clock) -> Callable[..., Any]:
    def loss_func(output: torch.Tensor) -> torch.Tensor:
        clock.advance(30)
        return output

    def forward_step(data_iterator: Any, model: Any) -> Any:
        clock.advance(5)
        next(data_iterator)
        clock.advance(6)
        output = model(torch.zeros(1))
        clock.advance(3)  # belongs to the loss
        return output, loss_func

    return forward_step


def fake_train_step(clock: Clock, forward_step: Any, data_iterator: Any, model: Any) -> None:
    for _ in range(2):  # micro-batches
        output, loss_func = forward_step(data_iterator, model)
        loss_func(output)
        clock.advance(40)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--warmup-steps", "1"], "at least 2"),
            (["--steps", "0"], "at least 2 and 1"),
            (["--megatron-script", "nowhere.py"], "nowhere.py: no such file"),
            (["--seq-length", "8", "9", "--micro-batch-size", "1", "2", "3"], "has 3 values"),
        ],
    )
    def test_what_cannot_be_measured(self, flags: list[str], message: str) -> None:
        args = build_parser("").parse_args(["--lengths", "smile", *flags])
        with pytest.raises(ConfigError, match=message):
            check_flags(args)

    def test_batch_sizes_by_length(self) -> None:
        flags = "--lengths smile --seq-length 8 16 --micro-batch-size 4 2 --global-batch-size 8"
        sizes = row_sizes(build_parser("").parse_args(flags.split()))
        found = [(s.sequence_length, s.micro_batch_size, s.global_batch_size) for s in sizes]
        assert found == [(8, 4, 8), (16, 2, 8)]

    @pytest.mark.parametrize(
        ("flags", "kernels"),
        [
            ([], "torch"),
            (["--packed-attention", "te"], "te"),
            (["--transformer-impl", "transformer_engine"], None),
        ],
    )
    def test_stock_and_packed_rows_get_one_kernel(
        self, flags: list[str], kernels: str | None, datasets: Datasets, tmp_path: Path
    ) -> None:
        args = build_parser("").parse_args(["--lengths", "smile", *flags])
        packed, stock = (
            command_of(
                variant,
                args,
                row_sizes(args)[0],
                datasets,
                vocab_size=VOCAB_SIZE,
                cache_folder=tmp_path,
            )
            for variant in ("packed", "stock")
        )
        found = None
        if "--packed-attention" in packed:
            found = packed[packed.index("--packed-attention") + 1]
        assert found == kernels
        assert ("whole_row_layer_spec" in stock) == ("transformer_engine" not in stock)
        differ = {"--dataset-provider", "--data-path"}
        assert differ < set(packed) & set(stock)


@pytest.mark.distributed
class TestRuns:
    def test_a_run_that_fails_is_heard(self, tmp_path: Path) -> None:
        commands = {"first": ["missing-1.py"], "second": ["missing-2.py"]}
        outcomes = dict(
            run_in_turn(
                commands, work_folder=tmp_path, log_folder=tmp_path, warmup_steps=2, timeout=120
            )
        )
        assert list(outcomes) == list(commands)
        for number, outcome in enumerate(outcomes.values(), start=1):
            assert isinstance(outcome, JobError)
            assert f"missing-{number}.py: no such script" in str(outcome)

    @pytest.mark.slow
    def test_all_variants_on_the_cpu(self, tmp_path: Path) -> None:
        # Two sessions of 27 positions fill a row of 54: the targets of a step are known.
        lengths = lengths_file(tmp_path, *["10 5 6 7"] * 8)
        checkout = os.environ.get("MEGATRON_LM_PATH")
        script = ROOT / "tests" / "scripts" / "stock_rows.py"
        if checkout:
            script = Path(checkout) / "pretrain_gpt.py"
        command = [sys.executable, str(ROOT / "benchmarks" / "train_throughput.py")]
        command += ["--lengths", str(lengths), "--megatron-script", str(script)]
        command += "--model tiny --dtype fp32 --seq-length 54 --micro-batch-size 1".split()
        command += "--global-batch-size 2 --steps 3 --warmup-steps 2".split()
        command += ["--extra", "--num-workers 0", "--json", str(tmp_path / "out.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        content = json.loads((tmp_path / "out.json").read_text())
        runs = {run["variant"]: run for run in content["runs"]}
        assert list(runs) == ["stock", "packed", "padded", "split"]
        targets_per_step = {"stock": [108], "packed": [48], "padded": [24], "split": [10, 12, 14]}
        squares_per_step = {"packed": 4 * 27**2}
        for variant, run in runs.items():
            steps = run["record"]["steps"]
            assert len(steps) == 3
            assert {step["targets"] for step in steps} <= set(targets_per_step[variant])
            squares = squares_per_step.get(variant, 2 * 54**2)
            assert [step["piece_squares"] for step in steps] == [squares] * 3
            assert_measured(run)
        comparison = content["comparisons"][0]
        assert comparison["bounds"] == {"padded": 2.0, "split": 4.0}
        ratio = comparison["ratios"]["packed / stock, tokens/s"]
        assert ratio == pytest.approx(
            runs["stock"]["measures"]["step_seconds"] / runs["packed"]["measures"]["step_seconds"]
        )
        assert f"{ratio:.3f}" in done.stdout
        assert done.stdout.index("packed / stock") < done.stdout.index("step s")


def assert_measured(run: dict[str, Any]) -> None:
    """A run's numbers are those of its steps."""
    steps, measures = run["record"]["steps"], Measures(**run["measures"])
    middle = median(step["seconds"] for step in steps)
    assert 0 < middle == measures.step_seconds
    assert measures.tokens_per_second == pytest.approx(2 * 54 / middle)
    if run["variant"] == "stock":
        assert measures.target_tokens_per_second is None
    else:
        counted = sum(step["targets"] for step in steps)
        assert measures.target_tokens_per_second == pytest.approx(counted / 3 / middle)
    for step in steps:
        assert 0 < sum(step["host"].values()) < 1.5 * step["seconds"]
        assert all(seconds > 0 for seconds in step["host"].values())
    # By hand: 3 passes * 2 operations * (parameters of the products, and attention's halves).
    layer = 64 * (4 * 64 + 3 * 128)
    per_token = 6 * (2 * layer + 64 * 512)
    whole = 2 * 54 * per_token + 2 * 6 * 64 * 2 * 54**2
    assert run["record"]["flops_per_step"] == whole
    in_pieces = whole
    if run["variant"] == "packed":
        in_pieces -= 2 * 6 * 64 * (2 * 54**2 - 4 * 27**2)
    assert run["record"]["flops_per_step_in_pieces"] == in_pieces
    assert run["record"]["matmul_flops_per_second"] > 1e9
    assert run["record"]["num_parameters"] == 2 * 512 * 64 + 2 * layer + 5 * 64
