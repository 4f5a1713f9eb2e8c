"""Runs real Megatron training jobs under torchrun and reads what they recorded."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

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
) -> JobResult:
    """Train the tests' small GPT for `train_iters` steps, recording into `folder`."""
    all_flags = [*MODEL_FLAGS, *TRAINING_FLAGS, "--train-iters", str(train_iters), *flags]
    all_flags += ["--data-cache-path", str(folder / "cache")]
    run_megatron(all_flags, num_ranks=num_ranks, env={"RECORD_DIR": str(folder), **(env or {})})
    return read_record(folder, train_iters)


def read_record(folder: Path, train_iters: int) -> JobResult:
    """What a job of `train_iters` steps recorded into `folder`."""
    return JobResult(
        losses=[json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()],
        gradients=[load_tensors(folder / f"gradients-{step}") for step in range(train_iters)],
        parameters=load_tensors(folder / "parameters"),
    )


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint, whole, as float64."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, object] = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return {
        name: value.double()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def relative_difference(
    ours: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> float:
    """The largest |ours - reference| / |reference| over the tensors, in the Euclidean norm."""
    assert ours.keys() == reference.keys()
    assert len(reference) > 5
    return max(
        float((ours[name] - wanted).norm() / wanted.norm()) for name, wanted in reference.items()
    )


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


def train_sentencepiece(folder: Path, texts: Sequence[str], vocab_size: int) -> Path:
    """A SentencePiece model that knows every character of `texts`."""
    import io

    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path
