"""PREFIX.json: what a preprocessed dataset is, beside Megatron's .bin and .idx."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_multiturn.errors import DatasetError
from megatron_multiturn.modes import MAX_TURN_WEIGHTS
from megatron_multiturn.vocabulary import TokenizerIdentity

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateIdentity:
    """The template that the sessions are written in."""

    name: str
    content_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file that the sessions came from, as it was named then."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much there is; of the sessions kept, except for `rejected`."""

    sessions: int
    segments: int
    turns: int  # with at least one target token
    tokens: int
    target_tokens: int
    rejected: dict[str, int]  # reason -> sessions


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole manifest; it is written last, so where it lies the dataset is complete."""

    format_version: int
    tool_version: str
    tokenizer: TokenizerIdentity
    template: TemplateIdentity
    turn_weights: tuple[float, ...]  # the modes of targets index it
    counts: Counts
    inputs: tuple[InputFile, ...]
    bin_bytes: int
    idx_bytes: int
    idx_sha256: str  # names what the pack plan depends on, wherever the files lie

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=2) + "\n"


def manifest_path(prefix: str) -> str:
    return prefix + ".json"


def read_manifest(prefix: str) -> Manifest:
    """Raises DatasetError if it is missing, broken or of another format version."""
    path = manifest_path(prefix)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DatasetError(
            f"{path}: no manifest, so {prefix} is no complete dataset of this package; run "
            "megatron-multiturn-preprocess (again, if it was interrupted) or correct the prefix, "
            "which goes without .bin or .idx"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: the manifest cannot be read ({error})") from None
    try:
        return _from_json(json.loads(text), path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            f"{path}: this is no manifest of a preprocessed dataset ({error}); preprocess again"
        ) from None


def file_hash(path: str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_json(value: dict[str, Any], path: str) -> Manifest:
    version = value["format_version"]
    if version != FORMAT_VERSION:
        raise DatasetError(
            f"{path}: format version {version!r}, but this version of the package reads "
            f"{FORMAT_VERSION}; preprocess again or use the version {value.get('tool_version')!r}"
        )
    weights = tuple(float(weight) for weight in value["turn_weights"])
    if not 1 <= len(weights) <= MAX_TURN_WEIGHTS:
        raise ValueError(f"{len(weights)} turn weights")
    fields = value | {
        "tokenizer": _part(TokenizerIdentity, value["tokenizer"]),
        "template": _part(TemplateIdentity, value["template"]),
        "turn_weights": weights,
        "counts": _part(Counts, value["counts"]),
        "inputs": tuple(_part(InputFile, entry) for entry in value["inputs"]),
    }
    return _part(Manifest, fields)


def _part[Part](kind: type[Part], value: dict[str, Any]) -> Part:
    """The dataclass, of exactly its fields, numbers and texts of the declared type."""
    made = kind(**value)
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        wanted = field.type
        if wanted in (int, str) and type(getattr(made, field.name)) is not wanted:
            raise ValueError(f"{field.name!r} is {getattr(made, field.name)!r}")
    return made
