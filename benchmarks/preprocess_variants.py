"""What turns the messages of a corpus into tokens: our tool, libraries by themselves, Megatron."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chat_corpus import Corpus
from stamped_runs import CommandError, StampedRun, run_stamped

_ROOT = Path(__file__).resolve().parent.parent
_STOCK_LINES = 20  # that Megatron's tool is to print of a corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerChoice:
    """A tokenizer, and the template that our tool writes sessions by."""

    model: str  # a folder with tokenizer.json, or a SentencePiece model
    template: str

    @property
    def is_sentencepiece(self) -> bool:
        return self.model.endswith(".model")

    @property
    def library(self) -> str:
        return "sentencepiece" if self.is_sentencepiece else "tokenizers"

    def flags(self) -> list[str]:
        kind = "SentencePieceTokenizer" if self.is_sentencepiece else "HuggingFaceTokenizer"
        return ["--tokenizer-type", kind, "--tokenizer-model", self.model]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of a variant. Of a library by itself there is no more than its encoding."""

    mb_per_second: float  # of the messages' text, while it worked
    work_seconds: float
    start_seconds: float | None = None  # before that
    wall_seconds: float | None = None
    first_line_seconds: float | None = None  # on stderr


Variant = Callable[[], dict[str, Measured]]  # by name: a process may have several to tell of


def raw_library(corpus: Corpus, choice: TokenizerChoice, library: str) -> dict[str, Measured]:
    """The batch encoder of a library on all messages at once, on all cores.

    Of gigatoken a first and a second call in a process: "gigatoken, cold", "gigatoken, warm".
    """
    program = str(Path(__file__).with_name("raw_encoding.py"))
    command = [sys.executable, program, library, choice.model, str(corpus.sessions)]
    ran = run_stamped(command, environment={"PYTHONPATH": str(_ROOT)})
    seconds = json.loads(ran.lines[-1].text)["seconds"]
    names = [library] if len(seconds) == 1 else [f"{library}, cold", f"{library}, warm"]
    return {
        name: Measured(mb_per_second=corpus.num_bytes / 1e6 / one, work_seconds=one)
        for name, one in zip(names, seconds, strict=True)
    }


def our_tool(
    corpus: Corpus, choice: TokenizerChoice, engine: str, folder: Path, *, memory: bool = False
) -> tuple[Measured, StampedRun]:
    """The whole of megatron-multiturn-preprocess.

    Its work begins where it says that the tokenizer is loaded and compared; with the reference
    engine, which says nothing, as many seconds before its closing table as that names. It ends
    with the process. Raises CommandError if not every session was kept.
    """
    command = [sys.executable, "-m", "megatron_multiturn.preprocess", "--overwrite"]
    command += ["--input", str(corpus.sessions), "--output-prefix", str(folder / "ours")]
    command += ["--template", choice.template, *choice.flags(), "--tokenizer-engine", engine]
    command += ["--workers", str(len(os.sched_getaffinity(0)))]
    ran = run_stamped(command, environment={"PYTHONPATH": str(_ROOT)}, memory=memory)
    table = "\n".join(line.text for line in ran.lines)
    kept = _number(r"kept +([\d,]+) sessions", table)
    if kept != len(corpus.text_bytes):
        raise CommandError(f"{kept} of {len(corpus.text_bytes)} sessions were kept\n{table}")
    if loaded := ran.first("preprocess: encoding with gigatoken"):
        began = loaded.seconds
    else:
        closing = ran.first("kept")
        assert closing is not None
        tokens = _number(r"tokens +([\d,]+),", table)
        began = closing.seconds - tokens / _number(r"([\d,]+) tokens/s", table)
    return _measured(ran, began, corpus.num_bytes), ran


def stock_tool(
    corpus: Corpus, choice: TokenizerChoice, checkout: Path, folder: Path
) -> dict[str, Measured]:
    """Megatron's tools/preprocess_data.py with 2 workers on the joined texts.

    Its work begins with its first line of progress, at which its workers have loaded their
    tokenizers; the documents before it do not count.
    """
    interval = max(1, len(corpus.text_bytes) // _STOCK_LINES)
    ran = _run_megatron(
        "preprocess_data.py",
        ["--workers", "2", "--append-eod", "--log-interval", str(interval)],
        corpus,
        choice,
        checkout,
        folder,
    )
    line = ran.first("Processed ")
    assert line is not None
    num_bytes = sum(corpus.text_bytes[interval:])
    return {"megatron": _measured(ran, line.seconds, num_bytes)}


def stock_gigatoken_tool(
    corpus: Corpus, choice: TokenizerChoice, checkout: Path, folder: Path
) -> dict[str, Measured]:
    """Megatron's tools/preprocess_data_fast.py on the joined texts, from its reading on."""
    flags = ["--use-gigatoken", "--append-eod"]
    ran = _run_megatron("preprocess_data_fast.py", flags, corpus, choice, checkout, folder)
    line = ran.first("Tokenizing file")
    assert line is not None
    return {"megatron, gigatoken": _measured(ran, line.seconds, corpus.num_bytes)}


def _run_megatron(
    tool: str,
    flags: list[str],
    corpus: Corpus,
    choice: TokenizerChoice,
    checkout: Path,
    folder: Path,
) -> StampedRun:
    command = [sys.executable, str(checkout / "tools" / tool), *choice.flags(), *flags]
    command += ["--input", str(corpus.joined), "--output-prefix", str(folder / "megatron")]
    return run_stamped(command, environment={"PYTHONPATH": str(checkout)})


def _measured(ran: StampedRun, began: float, num_bytes: int) -> Measured:
    return Measured(
        mb_per_second=num_bytes / 1e6 / (ran.seconds - began),
        work_seconds=ran.seconds - began,
        start_seconds=began,
        wall_seconds=ran.seconds,
        first_line_seconds=ran.first_of_stderr(),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise CommandError(f"nothing like {pattern!r} was said:\n{text}")
    return int(found[1].replace(",", ""))
