"""Pack plans on disk: built once per node, memory-mapped by all of its processes.

A plan lies as the arrays of its rows and of its pieces and a description, under a hash of
everything that determines it. The description is written last: a plan without one does not count.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_multiturn.errors import DatasetError
from megatron_multiturn.packing import PackPlan, PackStats
from megatron_multiturn.shared_files import atomic, locked
from megatron_multiturn.windows import CutReport, PieceTable

# Raise it whenever the same key would give another plan.
_PLAN_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanKey:
    """Everything that determines a plan, and nothing else: no loss average, no parallel size."""

    dataset_hash: str  # content of the dataset's index
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPlan:
    """A plan and what became of its sessions."""

    plan: PackPlan  # memory-mapped
    report: CutReport
    built_here: bool  # by this process; else it was there, or another one built it meanwhile


def cached_plan(
    folder: str | Path,
    key: PlanKey,
    build: Callable[[], tuple[PackPlan, CutReport]],
    *,
    doing: str = "build this pack plan",
) -> CachedPlan:
    """The plan of `key`, from `folder` or from `build()`, which is then saved there.

    One process builds; others that want the same plan wait for it and say so, and what it is
    `doing`. Raises DatasetError if the folder cannot be written.
    """
    stem = Path(folder) / f"plan-{key.digest()}"
    try:
        found = _load(stem)
        if found is None:
            stem.parent.mkdir(parents=True, exist_ok=True)
            with locked(stem.with_name(f"{stem.name}.lock"), doing):
                found = _load(stem)  # another process may have built it meanwhile
                if found is None:
                    _save(stem, *build(), key)
                    found = _load(stem, built_here=True)
    except OSError as error:
        raise DatasetError(
            f"cannot keep the pack plan in {stem.parent}: {error}; pass a writable folder with "
            "--data-cache-path"
        ) from error
    assert found is not None
    return found


def _array_paths(stem: Path) -> dict[str, Path]:
    names = ("row_offsets", "row_pieces", "session", "num_tokens", "cut_spans")
    return {name: stem.with_name(f"{stem.name}-{name}.npy") for name in names}


def _description_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _load(stem: Path, *, built_here: bool = False) -> CachedPlan | None:
    try:
        description = json.loads(_description_path(stem).read_text())
        # An empty array cannot be memory-mapped; a plain array is indexed faster than a map.
        arrays = {
            name: np.asarray(np.load(path, mmap_mode="r" if description["sizes"][name] else None))
            for name, path in _array_paths(stem).items()
        }
    except (FileNotFoundError, ValueError):
        return None  # not made yet, or damaged since
    plan = PackPlan(
        row_offsets=arrays["row_offsets"],
        row_pieces=arrays["row_pieces"],
        pieces=PieceTable(
            session=arrays["session"],
            num_tokens=arrays["num_tokens"],
            cut_spans=arrays["cut_spans"],
        ),
        stats=PackStats(**description["stats"]),
    )
    return CachedPlan(plan=plan, report=CutReport(**description["report"]), built_here=built_here)


def _save(stem: Path, plan: PackPlan, report: CutReport, key: PlanKey) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "row_offsets": plan.row_offsets,
        "row_pieces": plan.row_pieces,
        "session": plan.pieces.session,
        "num_tokens": plan.pieces.num_tokens,
        "cut_spans": plan.pieces.cut_spans,
    }
    for name, path in _array_paths(stem).items():
        with atomic(path) as temporary:
            np.save(temporary, arrays[name])
    description = {
        "key": asdict(key),
        "report": asdict(report),
        "stats": asdict(plan.stats),
        "sizes": {name: array.size for name, array in arrays.items()},
    }
    with atomic(_description_path(stem)) as temporary:
        temporary.write_text(json.dumps(description, indent=1))
