"""A job of several ranks whose end comes before its time."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from megatron_jobs import MODEL_FLAGS, make_dataset
from session_fixtures import make_record, tiny_sentencepiece

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    *MODEL_FLAGS,
    *"--seq-length 128 --max-position-embeddings 128 --micro-batch-size 1".split(),
    *"--global-batch-size 2 --lr 1e-3 --lr-decay-iters 9 --log-interval 1 --num-workers 0".split(),
    *"--eval-interval 1000 --eval-iters 0 --split 100,0,0 --train-iters 100000".split(),
]
# A provider whose rows fail on one rank, after some of them, while the other waits for it.
FAILING_ROWS = """
import os, signal
from megatron_multiturn.provider import train_valid_test_datasets_provider as packed

class Rows:
    def __init__(self, rows):
        self.rows, self.left = rows, 8
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0 and os.environ["RANK"] == "1":
            FAIL
        return self.rows[index]

def provide(num_samples):
    return Rows(packed(num_samples)[0]), None, None
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    records = [make_record(turns=1 + n % 5) for n in range(40)]
    flags = make_dataset(folder, records, Path(tiny_sentencepiece()))
    return [*flags, "--data-cache-path", str(folder / "cache")]


def start(flags: list[str], log: Path, python_path: Path = ROOT) -> subprocess.Popen[bytes]:
    """A job of two ranks by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "-m", "megatron_multiturn"]
    with log.open("w") as file:
        return subprocess.Popen(
            [*launcher, *FLAGS, *flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{python_path}"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.parametrize(
    ("fail", "report"),
    [
        ("raise OSError('the disk is gone')", r"rank +: 1 .*OSError: the disk is gone"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"rank +: 1 .*exitcode +: -9 .*SIGKILL"),
    ],
)
def test_a_rank_that_dies_ends_the_job_and_is_named(
    tmp_path: Path, data: list[str], fail: str, report: str
) -> None:
    (tmp_path / "failing_rows.py").write_text(FAILING_ROWS.replace("FAIL", fail))
    flags = [*data, "--dataset-provider", "failing_rows:provide"]
    job = start(flags, tmp_path / "log", tmp_path)
    assert job.wait(timeout=120) != 0
    output = (tmp_path / "log").read_text()
    assert re.search(r"iteration +2/", output)  # it was training
    cause = output[output.index("Root Cause (first observed failure)") :]
    assert re.search(report, cause, re.S)


def test_sigterm_saves_and_ends_as_megatron_does(tmp_path: Path, data: list[str]) -> None:
    saved = tmp_path / "saved"
    flags = [*data, "--exit-signal-handler", "--save", str(saved), "--save-interval", "1000000"]
    job = start(flags, tmp_path / "log")
    deadline = time.monotonic() + 120
    while "iteration        3/" not in (tmp_path / "log").read_text():
        assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)  # torchrun hands it on to its ranks
    job.wait(timeout=60)
    step = int((saved / "latest_checkpointed_iteration.txt").read_text())
    assert step >= 3
    assert (saved / f"iter_{step:07}" / "metadata.json").is_file()
    assert "exiting program after receiving SIGTERM" in (tmp_path / "log").read_text()
