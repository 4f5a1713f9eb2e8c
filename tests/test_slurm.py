"""The scripts for SLURM in a real one: two nodes on this machine, a real Megatron on the CPU."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from megatron_jobs import make_dataset, train_sentencepiece, word_sessions
from slurm_cluster import SlurmCluster, missing_programs

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"{', '.join(missing_programs())} not found; apt-get install slurm-wlm munge",
    ),
]

TRAIN_ITERS = 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as running:
        yield running


@dataclass(frozen=True, slots=True)
class Workplace:
    """A user's folder: a dataset, its tokenizer, and a copy of the script with settings in it."""

    folder: Path
    script: Path
    tokenizer: Path

    def log(self, job: str) -> str:
        path = self.folder / f"multiturn-{job}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def workplace(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("slurm")
    sessions = word_sessions([[3 + (7 * k) % 11, 5 + k % 3] for k in range(240)])
    texts = [str(message) for session in sessions for message in session["messages"]]  # type: ignore[attr-defined]
    tokenizer = train_sentencepiece(folder, texts, 120)
    make_dataset(folder, sessions, tokenizer)
    text = (repository / "launch/pretrain.slurm").read_text()
    mark = "# export MODEL=gpt-1.3b DATA_PATH=data/sessions TOKENIZER_MODEL=tokenizer.model"
    assert mark in text
    settings = [
        "MODEL=tiny SEQ_LENGTH=64 DATA_PATH=data TOKENIZER_MODEL=tokenizer.model",
        f"GLOBAL_BATCH_SIZE=8 TRAIN_ITERS={TRAIN_ITERS} LEARNING_RATE=1e-2 LOG_INTERVAL=1",
        "SPLIT=100,0,0 EVAL_ITERS=0 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1",
        f"MULTITURN_ROOT={repository} MULTITURN_PYTHON={sys.executable}",
    ]
    exports = "".join(f"export {line}\n" for line in settings)
    script = folder / "mine.slurm"
    script.write_text(text.replace(mark, exports + mark))
    return Workplace(folder=folder, script=script, tokenizer=tokenizer)


def losses(log: str) -> dict[int, float]:
    """Iteration -> loss."""
    found = re.findall(r"iteration +(\d+)/.*?\| lm loss: (\S+) \|", log)
    return {int(step): float(value) for step, value in found}


def wait_for(condition: Callable[[], object], timeout: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def unbroken(cluster: SlurmCluster, workplace: Workplace) -> dict[int, float]:
    """The losses of a job on two nodes that nothing disturbs."""
    begin = time.monotonic()
    job = cluster.submit("--nodes", "2", "mine.slurm", cwd=workplace.folder, SAVE_DIR="unbroken")
    wait_for(lambda: losses(workplace.log(job)), 120, lambda: workplace.log(job)[-6000:])
    print(f"{time.monotonic() - begin:.1f} s from sbatch to the first step")
    cluster.wait([job], 120, lambda: workplace.log(job)[-6000:])
    return losses(workplace.log(job))


def test_a_copied_script_trains_on_two_nodes(
    workplace: Workplace, unbroken: dict[int, float]
) -> None:
    assert list(unbroken) == list(range(1, TRAIN_ITERS + 1))
    assert unbroken[TRAIN_ITERS] < 0.8 * unbroken[1]
    (note,) = (workplace.folder / "unbroken/launches").glob("*.sh")
    assert "--nnodes 2" in note.read_text()
    checkpoint = workplace.folder / f"unbroken/iter_{TRAIN_ITERS:07}"
    ranks = {path.name.split("_")[2] for path in checkpoint.glob("__*.distcp")}
    assert ranks == {"0", "1"}, "a rank of each node has saved its part"


def ranks_of(job: str) -> list[int]:
    """The processes of a job's ranks and of their data loaders."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile, or is another user's
        is_rank = any(word.startswith(b"LOCAL_RANK=") for word in environment)
        is_rank = is_rank and b"megatron_multiturn" in words
        if is_rank and f"SLURM_JOB_ID={job}".encode() in environment:
            found.append(int(process.name))
    return found


@pytest.mark.slow
def test_at_its_time_limit_a_job_saves_and_is_queued_again(
    cluster: SlurmCluster, workplace: Workplace, unbroken: dict[int, float]
) -> None:
    """SLURM's signal comes some seconds before the time limit, and finds the job in training."""
    job = cluster.submit(
        *("--nodes", "2", "--time", "10", "--signal", "USR1@10", "mine.slurm"),
        cwd=workplace.folder,
        SAVE_DIR="broken",
    )

    def log() -> str:
        return workplace.log(job)

    wait_for(lambda: len(losses(log())) >= 5, 120, lambda: log()[-6000:])
    # Held still, for the time limit to come in the middle; SLURM looks every half minute.
    ranks = ranks_of(job)
    assert len(ranks) >= 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    cluster.command("scontrol", "update", f"JobId={job}", "EndTime=now+30")
    slurmd = [cluster.folder / f"slurmd.{node}.log" for node in ("n1", "n2")]
    signalled = f"ent signal {signal.SIGUSR1.value} to StepId={job}.0"
    wait_for(
        lambda: all(signalled in path.read_text() for path in slurmd),
        60,
        lambda: "\n".join(path.read_text()[-2000:] for path in slurmd),
    )
    # However slow this machine is now, what is looked for is what the signal does.
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    wait_for(lambda: "it is queued again" in log(), 60, lambda: log()[-6000:])
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    cluster.wait([job], 120, lambda: log()[-6000:])

    assert cluster.fields(job)["Restarts"] == "1"
    saved = re.findall(r"successfully saved checkpoint from iteration +(\d+)", log())
    stopped_at, end = int(saved[0]), int(saved[-1])
    assert 5 <= stopped_at < TRAIN_ITERS - 2
    assert end == TRAIN_ITERS
    broken = losses(log())
    assert broken.keys() == unbroken.keys()
    # In its second line Megatron shows the mean of a run's first two iterations.
    for step in unbroken.keys() - {stopped_at + 2}:
        assert broken[step] == pytest.approx(unbroken[step], rel=1e-5)
    assert len(list((workplace.folder / "broken/launches").glob("*.sh"))) == 2


# Rendered for every answer twice, since it may look at later messages: slow enough to be stopped.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' or messages|length == 0 %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Preprocessing:
    """sessions.jsonl several times over as NAME.jsonl, with bad sessions in between."""

    def __init__(self, workplace: Workplace, name: str, times: int, template: list[str]) -> None:
        self.folder = workplace.folder
        self.name = name
        text = (self.folder / "sessions.jsonl").read_text()
        (self.folder / f"{name}.jsonl").write_text(('{"messages": []}\n' + text) * times)
        self.flags = ["--input", f"{name}.jsonl", "--on-bad-session", "skip", *template]
        self.flags += ["--tokenizer-type", "SentencePieceTokenizer"]
        self.flags += ["--tokenizer-model", "tokenizer.model"]

    def run_whole(self) -> None:
        """One run without shards, which leaves NAME-whole."""
        from megatron_multiturn.preprocess import main

        with contextlib.chdir(self.folder):
            assert main([*self.flags, "--output-prefix", f"{self.name}-whole"]) == 0

    def queue(self, cluster: SlurmCluster, repository: Path) -> str:
        """An array of two tasks, which leaves NAME-merged; its number."""
        return cluster.submit(
            *("--array", "0-1", "--cpus-per-task", "1"),
            *(str(repository / "launch/preprocess.slurm"), *self.flags),
            cwd=self.folder,
            OUTPUT_PREFIX=f"{self.name}-merged",
            MULTITURN_PYTHON=sys.executable,
            OMP_NUM_THREADS="1",
        )

    def logs(self) -> str:
        files = sorted(self.folder.glob("multiturn-data-*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def wait(self, cluster: SlurmCluster) -> None:
        """Until nothing is queued; then the files must be the same."""
        wait_for(lambda: not cluster.command("squeue", "-h"), 240, self.logs)
        for ending in ("bin", "idx", "json", "rejected.jsonl"):
            merged = self.folder / f"{self.name}-merged.{ending}"
            assert merged.exists(), self.logs()
            whole = self.folder / f"{self.name}-whole.{ending}"
            assert merged.read_bytes() == whole.read_bytes()


def test_an_array_and_its_merge_write_what_one_run_writes(
    cluster: SlurmCluster, workplace: Workplace, repository: Path
) -> None:
    few = Preprocessing(workplace, "few", 2, ["--template", "firefly"])
    few.run_whole()
    few.queue(cluster, repository)
    few.wait(cluster)
    assert "few-merged: 2 shards, which can be removed now" in few.logs()


@pytest.mark.slow
def test_a_task_at_its_time_limit_goes_on_where_it_was(
    cluster: SlurmCluster, workplace: Workplace, repository: Path
) -> None:
    """SIGTERM, which comes before the time limit, is sent by hand here, so as to come in time."""
    (workplace.folder / "template.jinja").write_text(CHAT_TEMPLATE)
    many = Preprocessing(workplace, "many", 130, ["--chat-template", "template.jinja"])
    job = many.queue(cluster, repository)
    journal = workplace.folder / "many-merged.shard-00001-of-00002.unfinished/journal.json"
    wait_for(journal.exists, 120, many.logs)
    cluster.command("scancel", "--signal=TERM", f"{job}_1")
    many.run_whole()
    many.wait(cluster)
    assert f"job {job}_1 was stopped before its end; it is queued again" in many.logs()
