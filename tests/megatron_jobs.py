"""Runs real Megatron training jobs and reads what they recorded.

`run_megatron` starts a job as a user does, by torchrun. `train_and_record` starts the same
ranks, one process each, from a server that has imported Megatron already: a job then takes about
two seconds where torchrun takes fifteen.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megatron_multiturn.recording import whole_tensors

_PRELOADED = ["megatron.training", "megatron.core.tokenizers.text", "megatron_multiturn.forward"]

SCRIPT = Path(__file__).parent / "scripts" / "pretrain_and_record.py"

MODEL_FLAGS = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --position-embedding-type rope --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.1 "
    "--make-vocab-size-divisible-by 32"
).split()
TRAINING_FLAGS = (
    "--lr 1e-2 --min-lr 1e-2 --lr-decay-style constant --weight-decay 0 --clip-grad 0 "
    "--adam-eps 1e-3 --seed 7 --num-workers 0 --no-load-optim --no-load-rng --finetune "
    "--split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1 --no-one-logger"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What a job recorded. Tensors by Megatron's global parameter names, un-sharded, float64."""

    losses: list[dict[str, float]]  # one a step, by the name in the log
    gradients: list[dict[str, torch.Tensor]]  # one a step
    parameters: dict[str, torch.Tensor]  # after the last step


def run_megatron(
    flags: Sequence[str],
    *,
    num_ranks: int = 1,
    script: Path | None = SCRIPT,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """One job of `num_ranks` processes on this machine; its output is stdout and stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "-m", "megatron_multiturn"]
    command += ([str(script)] if script else []) + list(flags)
    process = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and process.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{process.stdout[-6000:]}")
    return process


def train_and_record(
    folder: Path,
    flags: Sequence[str],
    *,
    train_iters: int,
    num_ranks: int = 1,
    env: Mapping[str, str] | None = None,
    model_flags: Sequence[str] = MODEL_FLAGS,
    script: Path = SCRIPT,
    train_samples: int | None = None,
) -> JobResult:
    """Train the tests' small GPT for `train_iters` steps, recording into `folder`.

    train_samples: the rows that those steps take, for schedules that Megatron counts in rows.
    """
    length = ["--train-iters", str(train_iters)]
    if train_samples is not None:
        length = ["--train-samples", str(train_samples)]
    all_flags = [*model_flags, *TRAINING_FLAGS, *length, *flags]
    all_flags += ["--data-cache-path", str(folder / "cache")]
    run_ranks(
        [str(script), *all_flags], num_ranks, {"RECORD_DIR": str(folder), **(env or {})}, folder
    )
    return read_record(folder, train_iters)


def run_ranks(
    arguments: Sequence[str],
    num_ranks: int,
    env: Mapping[str, str],
    log_folder: Path,
    *,
    timeout: float = 300,
) -> None:
    """Run `python -m megatron_multiturn ARGUMENTS` on every rank; logs go to rank-N.log."""
    for attempts_left in (2, 1, 0):
        try:
            _run_ranks_once(arguments, num_ranks, env, log_folder, timeout)
        except AssertionError as error:
            # Another program took the port between its choice and its use.
            if "EADDRINUSE" not in str(error) or not attempts_left:
                raise
        else:
            return


def _run_ranks_once(
    arguments: Sequence[str],
    num_ranks: int,
    env: Mapping[str, str],
    log_folder: Path,
    timeout: float,
) -> None:
    context = _process_context()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **env,
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    log_folder.mkdir(parents=True, exist_ok=True)
    logs = [log_folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    ranks = [
        context.Process(
            target=_run_rank,
            args=(list(arguments), {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log),
        )
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    failed = _wait(ranks, timeout)
    if failed is not None:
        raise AssertionError(f"rank {failed} failed:\n{logs[failed].read_text()[-6000:]}")


def _process_context() -> Any:
    if torch.cuda.is_available():
        # Importing Megatron initializes CUDA, which no process survives being forked from.
        return multiprocessing.get_context("spawn")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as on any CPU run, but before the server imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _wait(ranks: Sequence[BaseProcess], timeout: float) -> int | None:
    """Wait for all ranks; at the first failure end the others and return the one that failed."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            break
        time.sleep(0.05)
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
    for process in ranks:
        process.kill()
        process.join()
    return failed[0] if failed else None


def _run_rank(arguments: list[str], env: dict[str, str], log: Path) -> None:
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(env)
    from megatron_multiturn.__main__ import main

    main(arguments)


def read_record(folder: Path, train_iters: int) -> JobResult:
    """What a job of `train_iters` steps recorded into `folder`."""
    return JobResult(
        losses=[json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()],
        gradients=[load_tensors(folder / f"gradients-{step}") for step in range(train_iters)],
        parameters=load_tensors(folder / "parameters"),
    )


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a job saved in `folder`, whole, as float64."""
    return {name: whole.double() for name, whole in whole_tensors(folder).items()}


def relative_difference(
    ours: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> float:
    """The largest |ours - reference| / |reference| over the tensors, in the Euclidean norm."""
    assert ours.keys() == reference.keys()
    assert len(reference) > 5
    differences = [
        (ours[name] - wanted).norm() / wanted.norm() for name, wanted in reference.items()
    ]
    return float(torch.stack(differences).max())  # NaN where any is, unlike Python's max


def make_dataset(
    folder: Path, sessions: Sequence[dict[str, object]], tokenizer_model: Path
) -> list[str]:
    """Preprocess `sessions` (OpenAI messages); the flags with which a job trains on them."""
    from megatron_multiturn.preprocess import main

    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(session, ensure_ascii=False) for session in sessions]
    (folder / "sessions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer"]
    tokenizer += ["--tokenizer-model", str(tokenizer_model)]
    command = ["--input", str(folder / "sessions.jsonl"), "--output-prefix", str(folder / "data")]
    assert main([*command, *tokenizer, "--template", "firefly", "--workers", "1"]) == 0
    return [*tokenizer, "--data-path", str(folder / "data")]


_WORDS = "red green blue one two three four five cat dog bird fish".split()


def word_sessions(turn_lengths: Sequence[Sequence[int]]) -> list[dict[str, object]]:
    """A session for each item: a one-word question and an answer of so many words a turn."""
    made: list[dict[str, object]] = []
    for index, lengths in enumerate(turn_lengths):
        messages = []
        for turn, length in enumerate(lengths):
            answer = " ".join(_WORDS[(5 * index + 3 * turn + k) % 12] for k in range(length))
            messages += [
                {"role": "user", "content": _WORDS[(index + turn) % 12]},
                {"role": "assistant", "content": answer},
            ]
        made.append({"messages": messages})
    return made


def train_sentencepiece(
    folder: Path, texts: Sequence[str], vocab_size: int, model_type: str = "unigram"
) -> Path:
    """A SentencePiece model that knows every character of `texts`."""
    import io

    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path
