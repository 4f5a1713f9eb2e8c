"""Who turns texts into ids: the tokenizer's own library, or `gigatoken` where it gives the same.

gigatoken encodes many times as fast. Its ids are compared with the library's, on what users
really have, before a run and throughout it: it is only ever a faster way to the same dataset.
"""

import importlib
import itertools
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.control_tokens import ControlLiterals, ControlToken
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.vocabulary import Vocabulary

ENGINES = ("auto", "gigatoken", "reference")

# What the process may grow by before what gigatoken remembers is thrown away.
_MAX_GROWTH_BYTES = 64 << 20
_FIRST_CALLS = 3
# One text of so many is compared throughout a run.
_CHECK_INTERVAL = 1024
# What tokenizers have been seen to differ in.
_TRICKY_TEXTS = (
    "",
    " ",
    "  a  b ",
    "\n",
    "a\n\n b\r\n\tc",
    "\u00a0x\u3000y\u200b",
    "don't WON'T I'm 12345 3.14",
    "e\u0301 \u00e9 \u212b \u1100\u1161",  # composed and decomposed
    "ﬁ ① ｆｕｌｌ",
    "你好，世界！「引号」",
    "ありがとう 안녕하세요 สวัสดี नमस्ते",
    "שלום مرحبا",
    "👩‍👩‍👧‍👦🇩🇪🏽",
    "\U00020000\U0010fffd",
    "\x00\x01\x7f\u0085",
    "\u2581a \u0120b \u010ac",  # how vocabularies write white space
    "def f(x):\n    return x ** 2  # ok\n",
    "a" * 300,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTexts:
    """The ids of a batch of texts, one after another."""

    ids: NDArray[np.int32]  # (num_ids,)
    offsets: NDArray[np.int64]  # (num_texts + 1,), from 0

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


class Engine(Protocol):
    """Encodes texts, with no special token added and none read out of them."""

    renews: bool  # whether it sees to it itself that its memory has a bound

    @property
    def name(self) -> str:
        """As the flag calls it."""

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """The ids of each text."""

    def find_lossy(self, texts: Sequence[str], encoded: EncodedTexts) -> NDArray[np.bool_]:
        """Which of the texts do not come back when their ids are decoded; (num_texts,)."""

    def has_grown(self) -> bool:
        """Whether it takes too much more memory than when this process began with it."""


class ReferenceEngine:
    """The tokenizer's own library."""

    name = "reference"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.renews = True
        self._vocabulary = vocabulary
        self._joint: str | None = None  # what it writes between two texts

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        ids, lengths = self._vocabulary.encode_flat(texts)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return EncodedTexts(ids=ids, offsets=offsets)

    def find_lossy(self, texts: Sequence[str], encoded: EncodedTexts) -> NDArray[np.bool_]:
        if self._joint is None:
            self._joint = self._vocabulary.decode_flat(self.encode(["a", "a"]).ids)[1:-1]
        if self._vocabulary.decode_flat(encoded.ids) == self._joint.join(texts):
            return np.zeros(len(texts), dtype=np.bool_)
        return _find_lossy(self._vocabulary, texts, encoded)

    def has_grown(self) -> bool:
        return False


class GigatokenEngine:
    """gigatoken, on this thread alone; `check_interval` texts apart it is compared."""

    name = "gigatoken"

    def __init__(self, vocabulary: Vocabulary, *, check_interval: int = _CHECK_INTERVAL) -> None:
        """Raises ConfigError if it cannot take this tokenizer, or reads it otherwise."""
        self.renews = True
        self._vocabulary = vocabulary
        self._check_interval = check_interval
        self._num_texts = 0
        self._backend, self._description, literals = _load(vocabulary)
        self._process = self._num_calls = self._held_bytes = 0
        self._compare(_TRICKY_TEXTS)
        # Texts that hold these are left to the library.
        self._unlike = ControlLiterals(
            [ControlToken(literal=one, special=False) for one in self._find_unlike(literals)]
        )
        two = self._encode(["a", "a"])
        self._joint = self._decode(two)[1:-1].decode()  # what it writes between two texts

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Raises ConfigError if a text that is compared has other ids."""
        if self.renews and self.has_grown():
            self._backend = None  # the old one goes before the new one comes
            self._backend = _load_backend(self._description)
            self._num_calls = 0
        encoded = self._encode(texts)
        if self._unlike.occur_in("\n".join(texts)):
            held = [i for i, text in enumerate(texts) if self._unlike.find(text)]
            encoded = _replaced(encoded, held, self._vocabulary.encode([texts[i] for i in held]))
        first = -self._num_texts % self._check_interval
        self._num_texts += len(texts)
        checked = range(first, len(texts), self._check_interval)
        self._compare_with([texts[i] for i in checked], [encoded[i].tolist() for i in checked])
        return encoded

    def check(self, texts: Sequence[str]) -> None:
        """Compare all of these; ConfigError if one has other ids."""
        encoded = self.encode(texts)
        self._compare_with(texts, [encoded[index].tolist() for index in range(len(texts))])

    def find_lossy(self, texts: Sequence[str], encoded: EncodedTexts) -> NDArray[np.bool_]:
        """As the reference would; nearly always all of them come back."""
        if self._decode(encoded) == self._joint.join(texts).encode():
            return np.zeros(len(texts), dtype=np.bool_)
        return _find_lossy(self._vocabulary, texts, encoded)

    def has_grown(self) -> bool:
        """Asked once a call: the backend keeps all texts between two spaces.

        In a language that puts few spaces nearly all of them are new.
        """
        if self._process != os.getpid():  # forked
            self._process, self._num_calls = os.getpid(), 0
        self._num_calls += 1
        if self._num_calls <= _FIRST_CALLS:  # by then all else has been in memory once
            self._held_bytes = _resident_bytes()
        return _resident_bytes() - self._held_bytes > _MAX_GROWTH_BYTES

    def _decode(self, encoded: EncodedTexts) -> bytes:
        return bytes(self._backend.decode(encoded.ids.view(np.uint32)))

    def _encode(self, texts: Sequence[str]) -> EncodedTexts:
        layout = self._backend.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return EncodedTexts(ids=ids.view(np.int32), offsets=offsets - offsets[0])

    def _find_unlike(self, literals: Sequence[str]) -> list[str]:
        """The tokens that were added to the vocabulary and are read otherwise here."""
        texts = [text for one in literals for text in (one, f"a{one}b {one}")]
        encoded = self._encode(texts)
        return [
            literals[index // 2]
            for index, wanted in enumerate(self._vocabulary.encode(texts))
            if encoded[index].tolist() != wanted
        ]

    def _compare(self, texts: Sequence[str]) -> None:
        encoded = self._encode(texts)
        self._compare_with(texts, [encoded[index].tolist() for index in range(len(texts))])

    def _compare_with(self, texts: Sequence[str], encoded: Sequence[list[int]]) -> None:
        for text, given, wanted in zip(texts, encoded, self._vocabulary.encode(texts), strict=True):
            if given != wanted:
                pairs = itertools.zip_longest(given, wanted)
                at = next(index for index, (one, other) in enumerate(pairs) if one != other)
                raise ConfigError(
                    f"gigatoken differs from the tokenizer's own library at id {at} of "
                    f"{text[:60]!r}, with {given[at : at + 6]} for {wanted[at : at + 6]}; pass "
                    "--tokenizer-engine reference"
                )


def choose_engine(name: str, vocabulary: Vocabulary, sample: Sequence[str]) -> tuple[Engine, str]:
    """(the engine, what to say of the choice) for `--tokenizer-engine NAME`.

    sample: texts of the user's data, on all of which gigatoken is compared. Raises ConfigError
    if `gigatoken` is asked for and cannot be had.
    """
    if name == "reference":
        return ReferenceEngine(vocabulary), ""
    try:
        engine = GigatokenEngine(vocabulary)
        engine.check(sample)
    except ConfigError as error:
        if name == "gigatoken":
            raise
        return ReferenceEngine(vocabulary), f"encoding with the slower reference tokenizer: {error}"
    return engine, f"encoding with gigatoken, equal to the tokenizer on {len(sample):,} texts"


def _replaced(
    encoded: EncodedTexts, indices: Sequence[int], ids: Sequence[list[int]]
) -> EncodedTexts:
    """The texts with the ids of some of them replaced."""
    pieces = np.split(encoded.ids, encoded.offsets[1:-1])
    for index, given in zip(indices, ids, strict=True):
        pieces[index] = np.array(given, dtype=np.int32)
    offsets = np.cumsum([0, *map(len, pieces)])
    return EncodedTexts(ids=np.concatenate(pieces), offsets=offsets)


def _find_lossy(
    vocabulary: Vocabulary, texts: Sequence[str], encoded: EncodedTexts
) -> NDArray[np.bool_]:
    decoded = vocabulary.decode([encoded[index].tolist() for index in range(len(texts))])
    return np.fromiter(
        (one != other for one, other in zip(decoded, texts, strict=True)), np.bool_, len(texts)
    )


def _resident_bytes() -> int:
    """What this process has in memory."""
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def _load_backend(description: bytes) -> Any:
    return importlib.import_module("gigatoken").Tokenizer.from_json(description)


def _load(vocabulary: Vocabulary) -> tuple[Any, bytes, list[str]]:
    """(the backend, what it is loaded from, the literals of tokens added to the vocabulary)

    Raises ConfigError if it cannot load it.
    """
    try:
        gigatoken = importlib.import_module("gigatoken")
        orjson = importlib.import_module("orjson")
    except ImportError as error:
        raise ConfigError(
            f"gigatoken cannot be imported ({error}); `pip install gigatoken orjson`"
        ) from None
    try:
        source = vocabulary.serialized()
        if isinstance(source, bytes):
            source = gigatoken.Tokenizer.from_sentencepiece(source)._hf_json
        description = orjson.loads(source)
        added = description.get("added_tokens", ())
        # A message that spells a special token is text.
        description["added_tokens"] = [token for token in added if not token["special"]]
        text: bytes = orjson.dumps(description)
        return _load_backend(text), text, [token["content"] for token in added]
    except ConfigError:
        raise
    except BaseException as error:  # a panic of its Rust part is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ConfigError(f"gigatoken cannot take this tokenizer ({error})") from None
