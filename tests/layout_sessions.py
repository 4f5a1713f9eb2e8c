"""The data of the layout tests: sessions that fill 16 rows and hold every hard case.

A step of 16 rows is then the whole data set, whichever rows a plan makes of it, and what a step
must compute is known without a plan. Each session is drawn as its segments, `c` for context and a
capital letter for the target of a turn, with their lengths: `c9 A3 c1 A2 c5 B1` has a turn A with
a masked gap and a turn B of one token.
"""

import re
from pathlib import Path

import numpy as np
from megatron_jobs import train_sentencepiece
from session_fixtures import megatron_tokenizer

from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig
from megatron_multiturn.encoding import EncodedSession, join_encoded
from megatron_multiturn.manifest import TemplateIdentity
from megatron_multiturn.session_writer import SessionWriter
from megatron_multiturn.vocabulary import tokenizer_fingerprint

SEQUENCE_LENGTH = 256
NUM_ROWS = 16
SEED = 20103  # of the order of the rows; see test_layout_sessions.py
VOCABULARY_SIZE = 100  # Megatron pads it to 128 for every tensor parallel size up to 4

# They fill 16 rows, whatever multiple of up to 8 their lengths are rounded up to; the plan mixes
# the lines. Five sessions have no turn, and `A1` that opens a session is predicted by nothing.
_ROWS = """
c257
c257
c257
c249
c241
c100 A120 c21
c4 A1 c3 B1 c2 C2 c3 D1 c5 E4 c1 F1 c2 G3 c7 H1 c4 I1 c3 J2 c2 K1 c6 L1 | c60 A120
A1 c30 A1 c9 B40 C3 c5 D60 c2 | c11 A1 | c15 A9 c3 A5 c4 A11 c20 B4
c90 A30 c50
c150 A45 c3 B2
A8 c40 B4 | c12 A160 c20
c8 A1 c8 B1 c8 C1 c8 D1 c8 E1 c8 F1 c8 G1 | c19 A100 | c25 A2 c26
c10 A70 c10 B70 c10 | c7 A3 c7 B3 c7 C3 c7 D3 c7 E3
c200 A7 B1 C5 c2 D1 | c16 A12
A1 c32 B129 c14
c5 A5 c5 B5 c5 C5 c5 D5 c5 E5 c5 F5 c5 G5 | c70 A80 c1 B1
"""


def draw_session(drawing: str, rng: np.random.Generator) -> EncodedSession:
    """The session of a drawing, of random tokens."""
    segments = [(kind, int(length)) for kind, length in re.findall(r"([cA-Z])(\d+)", drawing)]
    modes, turn = [], "c"
    for kind, _ in segments:
        modes.append(0 if kind == "c" else 2 if kind == turn else 1)
        turn = turn if kind == "c" else kind
    lengths = np.array([length for _, length in segments], dtype=np.int32)
    return EncodedSession(
        tokens=rng.integers(0, VOCABULARY_SIZE, lengths.sum(), dtype=np.int32),
        segment_lengths=lengths,
        modes=np.array(modes, dtype=np.int8),
        location=drawing,
    )


def write_layout_sessions(folder: Path) -> list[str]:
    """Write the data set; the flags with which a job trains on it, `--data-path` last."""
    words = [f"word{number}" for number in range(VOCABULARY_SIZE - 3)]
    model = train_sentencepiece(folder, words, VOCABULARY_SIZE, model_type="word")
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", str(model))
    identity = tokenizer_fingerprint(tokenizer, "SentencePieceTokenizer")
    assert identity.vocab_size == VOCABULARY_SIZE
    template = TemplateIdentity(name="drawn", content_hash="0" * 8)
    rng = np.random.default_rng(0)
    drawings = [session for row in _ROWS.split("\n") for session in row.split("|") if session]
    with SessionWriter(str(folder / "data"), tokenizer=identity, template=template) as writer:
        for drawing in drawings:
            writer.add(join_encoded([draw_session(drawing, rng)]))
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    return [*flags, "--data-path", str(folder / "data")]


def build_layout_dataset(
    prefix: str, num_rows: int | None, *, piece_multiple: int = 1
) -> MultiTurnDataset:
    """The rows that a job takes from the data set, in its order."""
    from megatron.core.datasets.utils import Split

    config = MultiTurnDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE_LENGTH,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=str(Path(prefix).parent / "plans"),
        piece_multiple=piece_multiple,
    )
    store = MultiTurnDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(store.num_sessions, dtype=np.int32)
    return MultiTurnDataset(store, prefix, indices, num_rows, Split.train, config)
