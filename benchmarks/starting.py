"""`packing.py`, sections start and train: a corpus on disk, opened and trained on."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from corpora import NUM_SEGMENTS, Lengths, write_corpus, write_documents
from measuring import memory
from peers import train_tokenizer

from megatron_multiturn.tokenizer_flags import add_tokenizer_flags, build_tokenizer
from megatron_multiturn.vocabulary import tokenizer_fingerprint

_SEQUENCE_LENGTH = 4096
_TRAIN_LENGTH = 512
_TOKENIZER_TYPE = "HuggingFaceTokenizer"


def report_start(folder: Path, num_sessions: int, median: float, sigma: float) -> Path:
    """Write the corpus, and one of a tenth of it, and start on each; returns its prefix."""
    tokenizer = train_tokenizer(str(folder / "start-tokenizer"))
    parser = argparse.ArgumentParser()
    add_tokenizer_flags(parser, required=True)
    flags = parser.parse_args(["--tokenizer-type", _TOKENIZER_TYPE, "--tokenizer-model", tokenizer])
    identity = tokenizer_fingerprint(build_tokenizer(flags), _TOKENIZER_TYPE)
    prefixes = []
    for count in (num_sessions // 10, num_sessions):
        prefix = folder / f"corpus-{count}"
        lengths = Lengths(
            median=median, sigma=sigma, shortest=NUM_SEGMENTS, longest=_SEQUENCE_LENGTH + 1
        ).draw(count, seed=0)
        started = time.perf_counter()
        num_tokens = write_corpus(prefix, lengths, identity)
        write_documents(Path(f"{prefix}-documents"), prefix, lengths)
        print(
            f"\n{count:,} sessions, {count * NUM_SEGMENTS:,} segments, {num_tokens:,} tokens, "
            f"written in {time.perf_counter() - started:.0f} s; rows of {_SEQUENCE_LENGTH:,}"
        )
        print(
            f"{'from index to first row':<36}{'seconds':>9}"
            f"{'MiB kept beside maps / peak with maps':>40}"
        )
        for name, kind in (
            ("ours, cold", "ours"),
            ("ours, warm", "ours"),
            ("GPTDataset, cold", "gpt"),
            ("GPTDataset, warm", "gpt"),
        ):
            if "cold" in name:
                _forget(prefix)
            seconds, kept, most = _start(kind, prefix, count)
            print(f"{name:<36}{seconds:>9.2f}{kept:>30.0f} /{most:>8.0f}", flush=True)
        prefixes.append(prefix)
    return prefixes[-1]


def _forget(prefix: Path) -> None:
    """Ask the system to drop the files from its cache, so that they are read from the disk."""
    os.sync()
    for path in prefix.parent.glob(f"{prefix.name}*.*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _start(kind: str, prefix: Path, count: int) -> tuple[float, float, float]:
    """(seconds, MiB kept beside maps, MiB at most with maps) of a fresh process, once imported."""
    done = subprocess.run(
        [sys.executable, __file__, kind, str(prefix), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    seconds, kept, most = json.loads(done.stdout.splitlines()[-1])
    return seconds, kept, most


def _measure_start(kind: str, prefix: str, count: int) -> None:
    """In the fresh process: open, plan or read the plan, make the first row."""
    from peers import stock_gpt_dataset
    from reading import our_dataset

    cache = f"{prefix}-cache"
    before, all_before = memory("RssAnon"), memory("VmRSS")
    started = time.perf_counter()
    if kind == "ours":
        dataset = our_dataset(prefix, cache, count, _SEQUENCE_LENGTH)
    else:
        dataset = stock_gpt_dataset(
            f"{prefix}-documents", cache, count, sequence_length=_SEQUENCE_LENGTH
        )
    dataset[0]
    seconds = time.perf_counter() - started
    kept = (memory("RssAnon") - before) / 2**20
    most = (memory("VmHWM") - all_before) / 2**20  # maps that were read count in it
    print(json.dumps([seconds, kept, most]))


def report_training(folder: Path, prefix: Path) -> None:
    """Train a small GPT for a few steps on the corpus, by the command that users give."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["1", "-m", "megatron_multiturn", "--data-path", str(prefix)]
    command += ["--tokenizer-type", _TOKENIZER_TYPE]
    command += ["--tokenizer-model", str(folder / "start-tokenizer")]
    command += (
        f"--seq-length {_TRAIN_LENGTH} --max-position-embeddings {_TRAIN_LENGTH} --num-layers 2 "
        "--hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --position-embedding-type "
        "rope --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 8 "
        "--train-iters 6 --lr 1e-2 --log-interval 1 --split 100,0,0 --eval-iters 0 --num-workers 2"
    ).split()
    command += ["--data-cache-path", str(folder / "train-cache")]
    for name in ("cold", "warm"):
        started = time.perf_counter()
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-6000:])
        steps = [line for line in done.stdout.splitlines() if " iteration " in line]
        plans = [line for line in done.stdout.splitlines() if "plan" in line and "split of" in line]
        print(f"\ntraining, {name}: {len(steps)} steps in {time.perf_counter() - started:.0f} s")
        print("\n".join([*plans, steps[0], steps[-1]]), flush=True)


if __name__ == "__main__":
    _measure_start(sys.argv[1], sys.argv[2], int(sys.argv[3]))
