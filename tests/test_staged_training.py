"""The staged recipe trains: killed in the middle, it ends with the losses of an unbroken run."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from megatron_jobs import train_sentencepiece, word_sessions

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGES = ("1-dialogue", "2-knowledge", "3-instruction")


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of each kind: long dialogues, terms with explanations, instructions."""
    folder = tmp_path_factory.mktemp("staged")
    dialogues = word_sessions([[4 + (turn + k) % 7 for turn in range(12)] for k in range(12)])
    write_lines(folder / "dialogues.jsonl", dialogues)
    words = "red green blue one two three four five cat dog bird fish".split()
    terms = [f"{words[k % 12]} {words[k // 12]}" for k in range(48)]
    explained: list[dict[str, object]] = [
        {"query": term, "response": f"{term} {words[k % 5]}"} for k, term in enumerate(terms)
    ]
    write_lines(folder / "terms.jsonl", explained)
    instructions: list[dict[str, object]] = [
        {"instruction": f"count {term}", "input": "", "output": f"one two {term} three"}
        for term in terms
    ]
    write_lines(folder / "instructions.jsonl", instructions)
    (folder / "phrasings.txt").write_text("{query}\nwhat is {query}?\nexplain {query}.\n")
    texts = [path.read_text() for path in folder.iterdir()]
    train_sentencepiece(folder, "\n".join(texts).splitlines(), 150)
    return folder


def start(repository: Path, folder: Path, name: str) -> subprocess.Popen[bytes]:
    settings = {
        "DIALOGUE_DATA": "dialogues.jsonl",
        "KNOWLEDGE_DATA": "terms.jsonl",
        "INSTRUCTION_DATA": "instructions.jsonl",
        "TOKENIZER_MODEL": "tokenizer.model",
        "TEMPLATE": "firefly",
        "KNOWLEDGE_PHRASINGS": "phrasings.txt",
        "DIALOGUE_EPOCHS": "1",
        "DIALOGUE_BATCH": "4",
        "KNOWLEDGE_BATCH": "2",
        "INSTRUCTION_BATCH": "4",
        "DIALOGUE_WINDOW": "48",
        "MODEL": "tiny",
        "SEQ_LENGTH": "64",
        "SAVE_INTERVAL": "5",
        "LOG_INTERVAL": "1",
        "SPLIT": "100,0,0",
        "EVAL_ITERS": "0",
        "WORK_DIR": str(folder / name),
        "OMP_NUM_THREADS": "1",
        "MULTITURN_PYTHON": sys.executable,
    }
    with (folder / f"{name}.log").open("ab") as output:
        return subprocess.Popen(
            [str(repository / "launch/staged/run.sh")],
            cwd=folder,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def losses(log: str) -> list[dict[int, float]]:
    """For each stage of an unbroken or resumed run: iteration -> loss."""
    found: dict[str, dict[int, float]] = {stage: {} for stage in STAGES}
    for part in re.split(r"^== ", log, flags=re.MULTILINE):
        stage, _, text = part.partition(": training")
        lines = re.findall(r"iteration +(\d+)/.*?\| lm loss: (\S+) \|", text)
        if lines:
            found[stage] |= {int(step): float(value) for step, value in lines}
    return [found[stage] for stage in STAGES]


def processes_of(work_dir: Path) -> list[int]:
    """Those of a run: torchrun starts its ranks in sessions of their own."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
        except OSError:
            continue  # it has ended meanwhile, or is another user's
        if f"WORK_DIR={work_dir}\0".encode() in environment:
            found.append(int(process.name))
    return found


def kill_all(job: subprocess.Popen[bytes], work_dir: Path) -> None:
    """What a machine that fails does: every process of the run ends at once, without a word."""
    while processes := processes_of(work_dir):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    job.wait()


def test_killed_in_the_middle_it_ends_with_the_same_losses(repository: Path, folder: Path) -> None:
    whole = start(repository, folder, "whole")
    broken = start(repository, folder, "broken")

    def log(name: str) -> str:
        return (folder / f"{name}.log").read_text()

    latest = folder / "broken/2-knowledge/checkpoint/latest_checkpointed_iteration.txt"
    try:
        deadline = time.monotonic() + 400
        while not latest.exists() and time.monotonic() < deadline:
            assert broken.poll() is None, log("broken")[-6000:]
            time.sleep(0.02)
        kill_all(broken, folder / "broken")
        killed_at = int(latest.read_text())
        broken = start(repository, folder, "broken")
        assert broken.wait(400) == 0, log("broken")[-6000:]
        assert whole.wait(400) == 0, log("whole")[-6000:]
    finally:
        kill_all(whole, folder / "whole")
        kill_all(broken, folder / "broken")

    unbroken, resumed = losses(log("whole")), losses(log("broken"))
    for stage, steps, steps_resumed in zip(STAGES, unbroken, resumed, strict=True):
        assert len(steps) >= 5, stage
        assert steps_resumed.keys() == steps.keys(), stage
        assert steps_resumed[max(steps)] == pytest.approx(steps[max(steps)], rel=1e-5), stage
    assert killed_at < max(unbroken[1]), "it was killed in the middle of a stage"
    assert log("broken").count("== 1-dialogue: finished") == 1, "and not done again"
    for earlier, later in itertools.pairwise(STAGES):
        loaded = (
            rf"successfully loaded checkpoint from \S+/whole/{earlier}/checkpoint .* iteration 0\b"
        )
        assert re.search(loaded, log("whole")), later
    # Each stage begins with a schedule of its own.
    rates = re.findall(r"iteration +1/.*?learning rate: (\S+)", log("whole"))
    assert [float(rate) for rate in rates] == pytest.approx([1e-4, 1e-4, 2e-5], rel=0.2)
    # Windows were cut, and questions phrased.
    manifest = json.loads((folder / "whole/2-knowledge/data.json").read_text())
    assert manifest["counts"]["sessions"] == 48
    assert re.search(r"12 sessions, 12 longer than the window: 12 cut into", log("whole"))
