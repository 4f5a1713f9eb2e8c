"""What plans and rows are compared with, written from the published descriptions.

`segment_tree_best_fit` is best-fit-decreasing item by item: the rows with each room left are
kept in a list, and a segment tree over the rooms finds the least one that holds the next session.
`sequential_packer` takes the sessions in the order given and closes a row when one does not fit.
Both assign sessions to rows, as a plan must.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def segment_tree_best_fit(lengths: NDArray[np.int32], capacity: int) -> list[list[int]]:
    """The sessions of each row; O(log capacity) a session."""
    size = 1 << capacity.bit_length()  # leaf r: r if a row has room r, else 0
    tree = [0] * (2 * size)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rows: list[list[int]] = []
    for session in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[session])
        if tree[1] < length:
            row, room = len(rows), capacity
            rows.append([])
        else:
            node = 1
            while node < size:  # the left child holds the smaller rooms
                node *= 2
                if tree[node] < length:
                    node += 1
            room = node - size
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                _set(tree, node, 0)
        rows[row].append(session)
        left = room - length
        if left and not rows_with_room[left]:
            _set(tree, size + left, left)
        rows_with_room[left].append(row)
    return rows


def _set(tree: list[int], node: int, value: int) -> None:
    tree[node] = value
    while node > 1:
        node >>= 1
        largest = max(tree[2 * node], tree[2 * node + 1])
        if tree[node] == largest:
            return
        tree[node] = largest


def sequential_packer(lengths: NDArray[np.int32], capacity: int) -> list[list[int]]:
    """The sessions of each row, in the order given."""
    rows: list[list[int]] = []
    row: list[int] = []
    room = capacity
    for session, length in enumerate(lengths.tolist()):
        if length > room:
            rows.append(row)
            row, room = [], capacity
        row.append(session)
        room -= length
    rows.append(row)
    return rows


def train_tokenizer(folder: str, vocab_size: int = 4000) -> str:
    """A byte-level BPE tokenizer of common words, saved in Hugging Face's format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<pad>", "</s>", *(f"<SPECIAL_{i}>" for i in (10, 11, 12))],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    texts = [random_text(rng, 200) for _ in range(500)]
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


_SYLLABLES = [a + b for a in "bdfgklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er")]
_VOCABULARY = [x + y for x in _SYLLABLES for y in _SYLLABLES][:1500]


def random_text(rng: np.random.Generator, num_words: int) -> str:
    """Words that the tokenizer writes as one token each, for the most part."""
    return " ".join(_VOCABULARY[i] for i in rng.integers(len(_VOCABULARY), size=num_words).tolist())


def conversation(rng: np.random.Generator, num_tokens: int) -> list[dict[str, str]]:
    """A system message and three questions and answers, of about `num_tokens` tokens in all."""
    words = max(1, (num_tokens - 24) // 7)
    messages = [{"role": "system", "content": random_text(rng, words)}]
    for _ in range(3):
        messages += [
            {"role": role, "content": random_text(rng, words)} for role in ("user", "assistant")
        ]
    return messages


def stock_sft_dataset(
    rows: list[list[dict[str, str]]], tokenizer_folder: str, sequence_length: int
) -> Any:
    """Megatron's SFT dataset over rows of conversations that are packed already.

    It takes the place of its reader of JSON lines, which needs a library of its own and would
    only cost it more time.
    """
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers.text.libraries.sft_tokenizer import SFTTokenizer
    from megatron.training.datasets.sft_dataset import SFTDataset

    class Tokenizer(SFTTokenizer):
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012
        pad = property(lambda self: self.pad_id)

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        blend=(["none"], None),
        split="100,0,0",
        tokenizer=Tokenizer(tokenizer_folder, "nemotron-nano-v2"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        context_parallel_size=1,
    )
    return SFTDataset(rows, "none", np.arange(len(rows)), len(rows), Split.train, config)


def stock_gpt_dataset(prefix: str, cache: str, num_documents: int, *, sequence_length: int) -> Any:
    """Megatron's pretraining dataset with inter-document masking over one epoch."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, eos, pad = 1000, 2, 2, 0
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=True,
    )
    return GPTDataset(
        GPTDataset.build_low_level_dataset(prefix, config),
        prefix,
        np.arange(num_documents, dtype=np.int32),
        None,
        Split.train,
        config,
    )
