"""Pack plans on disk: built once per node, memory-mapped by all of its processes.

A plan lies as three arrays (the spans of its pieces make a fourth file) and a description,
under a hash of everything that determines it. The description is written last: a plan without
one does not count.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import DatasetError
from megatron_multiturn.packing import PackPlan, PackStats
from megatron_multiturn.windows import PieceTable

# Raise it whenever the same key would give another plan.
_PLAN_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanKey:
    """Everything that determines a plan, and nothing else: no loss average, no parallel size."""

    dataset_hash: str  # content of the dataset
    sessions: tuple[int, int]  # first and one past the last
    num_samples: int | None
    seed: int
    sequence_length: int
    piece_multiple: int
    long_session: str
    session_window: int | None
    window_context: float

    def digest(self) -> str:
        """A name for the plan's files."""
        text = json.dumps({"version": _PLAN_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def cached_plan(folder: str | Path, key: PlanKey, build: Callable[[], PackPlan]) -> PackPlan:
    """The plan of `key`, from `folder` or from `build()`, which is then saved there.

    Raises DatasetError if the folder cannot be written.
    """
    stem = Path(folder) / f"plan-{key.digest()}"
    try:
        plan = _load(stem)
        if plan is None:
            stem.parent.mkdir(parents=True, exist_ok=True)
            with _locked(stem):
                plan = _load(stem)  # another process of this node may have built it meanwhile
                if plan is None:
                    _save(stem, build(), key)
                    plan = _load(stem)
    except OSError as error:
        raise DatasetError(
            f"cannot keep the pack plan in {stem.parent}: {error}; pass a writable folder with "
            "--data-cache-path"
        ) from error
    assert plan is not None
    return plan


def _array_paths(stem: Path) -> dict[str, Path]:
    names = ("row_offsets", "row_pieces", "session", "num_tokens", "cut_spans")
    return {name: stem.with_name(f"{stem.name}-{name}.npy") for name in names}


def _description_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _load(stem: Path) -> PackPlan | None:
    try:
        description = json.loads(_description_path(stem).read_text())
    except FileNotFoundError:
        return None
    # An empty array cannot be memory-mapped.
    arrays = {
        name: np.load(path, mmap_mode="r" if description["sizes"][name] else None)
        for name, path in _array_paths(stem).items()
    }
    return PackPlan(
        row_offsets=arrays["row_offsets"],
        row_pieces=arrays["row_pieces"],
        pieces=PieceTable(
            session=arrays["session"],
            num_tokens=arrays["num_tokens"],
            cut_spans=arrays["cut_spans"],
        ),
        stats=PackStats(**description["stats"]),
    )


def _save(stem: Path, plan: PackPlan, key: PlanKey) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "row_offsets": plan.row_offsets,
        "row_pieces": plan.row_pieces,
        "session": plan.pieces.session,
        "num_tokens": plan.pieces.num_tokens,
        "cut_spans": plan.pieces.cut_spans,
    }
    for name, path in _array_paths(stem).items():
        with _atomic(path) as temporary:
            np.save(temporary, arrays[name])
    description = {
        "key": asdict(key),
        "stats": asdict(plan.stats),
        "sizes": {name: array.size for name, array in arrays.items()},
    }
    with _atomic(_description_path(stem)) as temporary:
        temporary.write_text(json.dumps(description, indent=1))


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name once written and synced."""
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.name}-", suffix=path.suffix, dir=path.parent
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(stem: Path) -> Iterator[None]:
    """Hold this plan's lock; a file system without locks only costs building it twice."""
    with stem.with_name(f"{stem.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
