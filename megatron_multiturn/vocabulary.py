"""One face for Megatron's tokenizers: plain text -> ids, special tokens -> single ids, identity.

Known are the SentencePiece and the Hugging Face tokenizers of Megatron. Text goes to the library
below Megatron's wrapper, because the wrapper encodes one text a call and adds special tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_multiturn.errors import ConfigError

TextRun = tuple[str, bool]  # the text, and whether it goes on in the middle of a text

# Texts that a tokenizer hardly joins with what follows, to be encoded first and cut off again.
_GUARDS = ("\n", "\u2603", "|")


class Vocabulary(Protocol):
    """What encoding needs of a tokenizer."""

    size: int
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with no special token added and none read out of the text."""

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        """The text of each list of ids."""

    def id_of(self, token: str) -> int | None:
        """The id of a special token, None if it is not one token of the vocabulary."""

    def literal_of(self, token_id: int) -> str:
        """How a special token is written."""


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
        if wrapper.removed_extra_spaces and not wrapper.ignore_extra_whitespaces:
            raise ConfigError(
                "the tokenizer is told to keep extra white space that its model removes, which "
                "only Megatron's wrapper can do, one text a call; leave out "
                "--tokenizer-sentencepiece-keep-extra-whitespaces"
            )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        return self._processor.decode(list(ids), num_threads=1)

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

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        if self._backend is not None:
            return self._backend.decode_batch(list(ids), skip_special_tokens=False)
        return [self._tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids]

    def id_of(self, token: str) -> int | None:
        return _id_or_none(self._tokenizer.get_vocab().get(token))

    def literal_of(self, token_id: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token_id)


class RunEncoder:
    """Encodes runs that begin a text and runs that go on in one alike to the whole text.

    SentencePiece puts a space before every text. A run that goes on in the middle of a text must
    not get it, so it is encoded behind a guard, which is cut off again.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._guard = ""
        self._guard_ids: list[int] = []
        for guard in _GUARDS:
            alone, joined, free = vocabulary.encode([guard, guard + "a", "a"])
            if alone and joined[: len(alone)] == alone:
                if joined[len(alone) :] != free:
                    self._guard, self._guard_ids = guard, alone
                return

    def encode(self, runs: Sequence[TextRun]) -> list[list[int]]:
        """The ids of each run."""
        encoded = self._vocabulary.encode([self._guarded(run) for run in runs])
        head = len(self._guard_ids)
        if not head:
            return encoded
        for index, (text, goes_on) in enumerate(runs):
            if not goes_on:
                continue
            if encoded[index][:head] == self._guard_ids:
                encoded[index] = encoded[index][head:]
            else:  # joined with the guard after all
                (encoded[index],) = self._vocabulary.encode([text])
        return encoded

    def find_lossy(self, runs: Sequence[TextRun], encoded: Sequence[list[int]]) -> set[int]:
        """The numbers of the runs that do not decode to their text.

        encoded: the ids of each run, from `encode`.
        """
        decoded = self._vocabulary.decode(
            [
                self._guard_ids + ids if goes_on and self._guard_ids else ids
                for (_, goes_on), ids in zip(runs, encoded, strict=True)
            ]
        )
        return {
            index
            for index, (run, text) in enumerate(zip(runs, decoded, strict=True))
            if self._guarded(run) != text
        }

    def _guarded(self, run: TextRun) -> str:
        text, goes_on = run
        return self._guard + text if goes_on else text


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
    digest = hashlib.sha256()
    for index, piece in pieces:
        digest.update(f"{index}\t{piece}\0".encode("utf-8", "surrogatepass"))
    digest.update(repr(special).encode())
    return TokenizerIdentity(
        type=tokenizer_type,
        vocab_size=int(tokenizer.vocab_size),
        content_hash=digest.hexdigest(),
    )


def _id_or_none(token_id: int | None) -> int | None:
    """SentencePiece says -1, Hugging Face None, where there is no such token."""
    return None if token_id is None or token_id < 0 else int(token_id)
