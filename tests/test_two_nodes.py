"""Two "nodes" of torchrun on this machine, which find each other over loopback, are one job."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_jobs import make_dataset, train_sentencepiece, word_sessions

pytestmark = pytest.mark.distributed


def start(repository: Path, folder: Path, log: str, **variables: str) -> subprocess.Popen[bytes]:
    settings = {
        "MODEL": "tiny",
        "SEQ_LENGTH": "64",
        "DATA_PATH": "data",
        "TOKENIZER_MODEL": "tokenizer.model",
        "GLOBAL_BATCH_SIZE": "8",
        "TRAIN_ITERS": "4",
        "LOG_INTERVAL": "1",
        "SPLIT": "100,0,0",
        "EVAL_ITERS": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "MULTITURN_PYTHON": sys.executable,
    }
    with (folder / log).open("wb") as output:
        return subprocess.Popen(
            [str(repository / "launch/pretrain_torchrun.sh")],
            cwd=folder,
            env={**os.environ, **settings, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def losses(folder: Path, *logs: str) -> dict[str, str]:
    """Iteration -> loss, as one of the nodes has logged it."""
    text = "".join((folder / log).read_text() for log in logs)
    return dict(re.findall(r"iteration +(\d+)/.*?\| lm loss: (\S+) \|", text))


def test_two_nodes_without_ranks_train_as_one_job(repository: Path, tmp_path: Path) -> None:
    """c10d rendezvous: the same command on both."""
    sessions = word_sessions([[3 + (7 * k) % 11, 5 + k % 3] for k in range(120)])
    texts = [str(message) for session in sessions for message in session["messages"]]  # type: ignore[attr-defined]
    make_dataset(tmp_path, sessions, train_sentencepiece(tmp_path, texts, 120))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SAVE_DIR": "two"}
    jobs = [start(repository, tmp_path, f"node-{node}", **both) for node in range(2)]
    jobs.append(start(repository, tmp_path, "alone", SAVE_DIR="one", NPROC_PER_NODE="2"))
    try:
        statuses = [job.wait(200) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    names = ("node-0", "node-1", "alone")
    assert statuses == [0, 0, 0], [(tmp_path / name).read_text()[-3000:] for name in names]
    of_two = losses(tmp_path, "node-0", "node-1")
    assert list(of_two) == ["1", "2", "3", "4"]
    assert of_two == losses(tmp_path, "alone")
    ranks = {path.name.split("_")[2] for path in (tmp_path / "two/iter_0000004").glob("__*")}
    assert ranks == {"0", "1"}
