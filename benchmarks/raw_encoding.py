"""What a tokenizer library does by itself with all texts of a file of sessions at once.

    python benchmarks/raw_encoding.py gigatoken|tokenizers|sentencepiece MODEL SESSIONS.jsonl

Prints, as JSON, the seconds of a first and of a second call of its batch encoder, on all cores
that this process may use, and the number of tokens. A process of its own, so that nothing is kept
from an earlier measurement.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from chat_corpus import read_sessions

# The callable encodes all texts and returns how to count their tokens, which is not timed.
Encode = Callable[[list[str]], Callable[[], int]]


def gigatoken(model: str) -> Encode:
    import gigatoken

    if model.endswith(".model"):
        tokenizer = gigatoken.Tokenizer.from_sentencepiece(model)
    else:
        tokenizer = gigatoken.Tokenizer.from_json((Path(model) / "tokenizer.json").read_bytes())

    def encode(texts: list[str]) -> Callable[[], int]:
        encoded = tokenizer.encode_batch(texts, parallel=True)
        return lambda: sum(len(ids) for ids in encoded.to_list())

    return encode


def tokenizers(model: str) -> Encode:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))

    def encode(texts: list[str]) -> Callable[[], int]:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return lambda: sum(len(encoding) for encoding in encoded)

    return encode


def sentencepiece(model: str) -> Encode:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=model)
    num_threads = len(os.sched_getaffinity(0))

    def encode(texts: list[str]) -> Callable[[], int]:
        encoded = processor.encode(texts, num_threads=num_threads)
        return lambda: sum(map(len, encoded))

    return encode


LIBRARIES: dict[str, Callable[[str], Encode]] = {
    "gigatoken": gigatoken,
    "tokenizers": tokenizers,
    "sentencepiece": sentencepiece,
}


def main() -> None:
    library, model, path = sys.argv[1:]
    texts = [message["content"] for session in read_sessions([path]) for message in session]
    encode = LIBRARIES[library](model)
    seconds = []
    # Only gigatoken keeps what it has seen for as long as the process lives.
    for _ in range(2 if library == "gigatoken" else 1):
        started = time.perf_counter()
        count_tokens = encode(texts)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds, "tokens": count_tokens()}))


if __name__ == "__main__":
    main()
