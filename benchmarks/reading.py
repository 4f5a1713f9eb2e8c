"""`packing.py`, section rows: how long a row takes."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from corpora import write_corpus, write_documents
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from peers import conversation, stock_gpt_dataset, stock_sft_dataset, train_tokenizer

from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig
from megatron_multiturn.vocabulary import TokenizerIdentity

_ROWS_TIMED = 100
_SFT_ROWS_TIMED = 12
_PASSES = 25  # over the rows, the data sets taking turns


def report_rows(
    folder: Path, lengths: NDArray[np.int32], sequence_lengths: list[int], repeats: int
) -> None:
    sessions, documents = folder / "sessions", folder / "documents"
    tokenizer = TokenizerIdentity(type="none", vocab_size=1000, content_hash="0")
    write_corpus(sessions, lengths, tokenizer)
    write_documents(documents, sessions, lengths)
    tokenizer_folder = train_tokenizer(str(folder / "tokenizer"))
    for sequence_length in sequence_lengths:
        cache = str(folder / f"cache-{sequence_length}")
        ours = our_dataset(str(sessions), cache, len(lengths), sequence_length)
        gpt = stock_gpt_dataset(
            str(documents), cache, len(lengths), sequence_length=sequence_length
        )
        rows = np.random.default_rng(0).permutation(min(len(ours), len(gpt)))
        sft = _sft_rows(ours, rows[:_SFT_ROWS_TIMED].tolist(), tokenizer_folder, sequence_length)
        timed = rows[:_ROWS_TIMED].tolist()
        best = _time_in_turns(
            {
                "ours, all keys": (ours, timed),
                "GPTDataset, inter-document": (gpt, timed),
                "SFTDataset": (sft, list(range(len(sft)))),
            },
            _PASSES * repeats,
        )
        print(f"\na row of {sequence_length:,}: {len(timed):,} rows, the least of the means")
        for name, seconds in best.items():
            ratio = seconds / best["ours, all keys"]
            print(f"{name:<28}{seconds * 1e3:>9.3f} ms{ratio:>10.2f} times ours", flush=True)


def our_dataset(
    prefix: str, cache: str, num_sessions: int, sequence_length: int
) -> MultiTurnDataset:
    config = MultiTurnDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=cache,
    )
    store = MultiTurnDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(num_sessions, dtype=np.int32)
    return MultiTurnDataset(store, prefix, indices, None, Split.train, config)


def _sft_rows(
    ours: MultiTurnDataset, rows: list[int], tokenizer_folder: str, sequence_length: int
) -> Any:
    """The stock SFT dataset over conversations as long as the pieces of some of our rows."""
    rng = np.random.default_rng(0)
    texts = []
    for row in rows:
        pieces = ours.plan.pieces_of_row(row)
        lengths = ours.plan.pieces.num_tokens[pieces].tolist()
        texts.append([message for length in lengths for message in conversation(rng, length)])
    return stock_sft_dataset(texts, tokenizer_folder, sequence_length)


def _time_in_turns(work: dict[str, tuple[Any, list[int]]], passes: int) -> dict[str, float]:
    """Least seconds a row of each, so that what else the machine does hits all alike."""
    best = dict.fromkeys(work, float("inf"))
    for number in range(passes):
        for name, (dataset, rows) in work.items():
            if name == "SFTDataset" and number >= 2:
                continue
            started = time.perf_counter()
            for row in rows:
                dataset[row]
            best[name] = min(best[name], (time.perf_counter() - started) / len(rows))
    return best
