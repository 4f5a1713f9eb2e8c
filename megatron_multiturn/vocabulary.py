"""One face for Megatron's tokenizers: plain text -> ids, special tokens -> single ids, identity.

Known are the SentencePiece and the Hugging Face tokenizers of Megatron. Text goes to the library
below Megatron's wrapper, because the wrapper encodes one text a call and adds special tokens.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.control_tokens import ControlToken, is_marked
from megatron_multiturn.errors import ConfigError


class Vocabulary(Protocol):
    """What encoding needs of a tokenizer."""

    size: int
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with no special token added and none read out of the text."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], list[int]]:
        """(the ids of `encode` one after another, how many of each text)"""

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]] | None:
        """The ids of a text, and behind which character each token ends; None if not known.

        A token that holds only a part of a character ends behind it.
        """

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        """The text of each list of ids."""

    def decode_flat(self, ids: NDArray[np.int32]) -> str:
        """The text of ids (n,), as if of one text."""

    def id_of(self, token: str) -> int | None:
        """The id of a special token, None if it is not one token of the vocabulary."""

    def literal_of(self, token_id: int) -> str:
        """How a special token is written."""

    def control_tokens(self) -> list[ControlToken]:
        """The tokens that stand for no text, and those that were added to the vocabulary."""

    def named_tokens(self) -> dict[str, str]:
        """How `bos_token`, `eos_token` and the like are written; "" for a BOS that is not there."""

    def serialized(self) -> str | bytes:
        """The tokenizer as a `tokenizer.json`, or as a SentencePiece model.

        Raises ConfigError if it cannot be written so.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerIdentity:
    """Says whether two tokenizers give the same ids, wherever their files lie."""

    type: str
    vocab_size: int
    content_hash: str


class SentencePieceVocabulary:
    """Over `sentencepiece.SentencePieceProcessor`."""

    def __init__(self, wrapper: Any) -> None:
        self._processor = wrapper.tokenizer
        self._added: dict[str, int] = dict(wrapper.special_token_to_id)
        self.size: int = wrapper.vocab_size
        self.bos_id = self._own_or("bos_token", wrapper, self._processor.bos_id())
        self.eos_id = self._own_or("eos_token", wrapper, self._processor.eos_id())
        self.unknown_id = _id_or_none(self._processor.unk_id())
        if not wrapper.ignore_extra_whitespaces and wrapper.removed_extra_spaces:
            raise ConfigError(
                "the tokenizer is told to keep extra white space that its model removes, which "
                "only Megatron's wrapper can do, one text a call; leave out "
                "--tokenizer-sentencepiece-keep-extra-whitespaces"
            )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], list[int]]:
        if not texts:
            return np.zeros(0, dtype=np.int32), []
        found = self._processor.encode(list(texts), num_threads=1, return_type="numpy")
        return np.concatenate(found), list(map(len, found))

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]] | None:
        pieces = self._processor.encode(text, return_type="proto").pieces
        # The library counts bytes.
        last_bytes = [
            index
            for index, character in enumerate(text)
            for _ in range(len(character.encode("utf-8", "surrogatepass")))
        ]
        ends: list[int] = []
        for piece in reversed(pieces):
            if piece.begin == piece.end and ends:  # a byte of a character that ends later
                ends.append(ends[-1])
            else:
                ends.append(last_bytes[piece.end - 1] + 1 if piece.end else 0)
        return [piece.id for piece in pieces], ends[::-1]

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        return self._processor.decode(list(ids), num_threads=1)

    def decode_flat(self, ids: NDArray[np.int32]) -> str:
        return self._processor.decode(ids)

    def id_of(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        found = self._processor.piece_to_id(token)
        return None if found == self._processor.unk_id() else found

    def literal_of(self, token_id: int) -> str:
        for token, added_id in self._added.items():
            if added_id == token_id:
                return token
        return self._processor.id_to_piece(token_id)

    def control_tokens(self) -> list[ControlToken]:
        below = self._processor
        literals = [
            below.id_to_piece(index)
            for index in range(below.vocab_size())
            if below.is_control(index)
        ]
        return [
            ControlToken(literal=literal, special=True)
            for literal in dict.fromkeys([*literals, *self._added])
        ]

    def named_tokens(self) -> dict[str, str]:
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unknown_id}
        return {"bos_token": ""} | {
            name: self.literal_of(token_id)
            for name, token_id in named.items()
            if token_id is not None
        }

    def serialized(self) -> str | bytes:
        return self._processor.serialized_model_proto()

    def _own_or(self, name: str, wrapper: Any, otherwise: int) -> int | None:
        token = getattr(wrapper, name, None)
        return self._added[token] if token in self._added else _id_or_none(otherwise)


class HuggingFaceVocabulary:
    """Over `transformers.PreTrainedTokenizerBase`, fast or not.

    A fast one is called at the Rust tokenizer below it: the wrapper's own work on the way in and
    out takes as long as the tokenisation.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self.size: int = len(tokenizer)
        self.bos_id = _id_or_none(tokenizer.bos_token_id)
        self.eos_id = _id_or_none(tokenizer.eos_token_id)
        self.unknown_id = _id_or_none(tokenizer.unk_token_id)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is None:
            return [
                self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
                    "input_ids"
                ]
                for text in texts
            ]
        self._backend.encode_special_tokens = True  # as text, that is
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], list[int]]:
        found = self.encode(texts)
        lengths = list(map(len, found))
        ids = np.fromiter(itertools.chain.from_iterable(found), np.int32, count=sum(lengths))
        return ids, lengths

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]] | None:
        if self._backend is None:
            return None
        self._backend.encode_special_tokens = True
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
        return encoding.ids, [stop for _, stop in encoding.offsets]

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        if self._backend is not None:
            return self._backend.decode_batch(list(ids), skip_special_tokens=False)
        return [self._tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids]

    def decode_flat(self, ids: NDArray[np.int32]) -> str:
        return self.decode([ids.tolist()])[0]

    def id_of(self, token: str) -> int | None:
        if self._backend is not None:
            return _id_or_none(self._backend.token_to_id(token))
        return _id_or_none(self._tokenizer.get_vocab().get(token))

    def literal_of(self, token_id: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token_id)

    def control_tokens(self) -> list[ControlToken]:
        added = {token.content: token for token in self._tokenizer.added_tokens_decoder.values()}
        special = set(self._tokenizer.all_special_tokens)
        return [
            ControlToken(
                literal=literal,
                special=literal in special or added[literal].special or is_marked(literal),
                strips_left=literal in added and added[literal].lstrip,
                strips_right=literal in added and added[literal].rstrip,
            )
            for literal in dict.fromkeys([*added, *sorted(special)])
        ]

    def named_tokens(self) -> dict[str, str]:
        named = self._tokenizer.special_tokens_map
        return {"bos_token": ""} | {
            name: str(token) for name, token in named.items() if isinstance(token, str)
        }

    def serialized(self) -> str | bytes:
        if self._backend is None:
            raise ConfigError("this tokenizer has no fast variant")
        return self._backend.to_str()


def open_vocabulary(tokenizer: Any) -> Vocabulary:
    """The vocabulary of one of Megatron's tokenizers; ConfigError for a kind not known here."""
    wrapper = getattr(tokenizer, "_tokenizer", tokenizer)
    library = getattr(tokenizer, "library", None)
    if library == "sentencepiece":
        return SentencePieceVocabulary(wrapper)
    below = getattr(wrapper, "tokenizer", None)
    if hasattr(below, "get_vocab") and hasattr(below, "batch_decode"):
        return HuggingFaceVocabulary(below)
    raise ConfigError(
        f"sessions cannot be encoded with a {type(wrapper).__name__}; use a --tokenizer-type of "
        "SentencePieceTokenizer, GPTSentencePieceTokenizer, Llama2Tokenizer or "
        "HuggingFaceTokenizer"
    )


def tokenizer_fingerprint(tokenizer: Any, tokenizer_type: str) -> TokenizerIdentity:
    """The identity of one of Megatron's tokenizers, from its vocabulary and special tokens."""
    wrapper = getattr(tokenizer, "_tokenizer", tokenizer)
    below: Any = getattr(wrapper, "tokenizer", None)
    if hasattr(below, "get_vocab"):
        pieces = sorted((index, piece) for piece, index in below.get_vocab().items())
        special = [below.bos_token_id, below.eos_token_id, below.pad_token_id, below.unk_token_id]
        special += sorted(
            index for index, token in below.added_tokens_decoder.items() if token.special
        )
    elif getattr(tokenizer, "library", None) == "sentencepiece":
        pieces = list(enumerate(wrapper.vocab))
        special = [below.bos_id(), below.eos_id(), below.pad_id(), below.unk_id()]
        special += [index for index, _ in pieces[: below.vocab_size()] if below.is_control(index)]
        special += sorted(wrapper.special_token_to_id.values())
    else:
        pieces = [(tokenizer.vocab_size, type(wrapper).__name__)]
        special = []
    content = "".join([f"{index}\t{piece}\0" for index, piece in pieces]) + repr(special)
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass"))
    return TokenizerIdentity(
        type=tokenizer_type,
        vocab_size=int(tokenizer.vocab_size),
        content_hash=digest.hexdigest(),
    )


def _id_or_none(token_id: int | None) -> int | None:
    """SentencePiece says -1, Hugging Face None, where there is no such token."""
    return None if token_id is None or token_id < 0 else int(token_id)
