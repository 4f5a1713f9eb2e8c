"""The journal of a run: how far it has come, by what settings, so that it can go on.

It is written every few seconds, once all that it tells of is on the disk.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_multiturn.errors import ConfigError
from megatron_multiturn.record_blocks import FilePlace
from megatron_multiturn.session_writer import SessionWriter
from megatron_multiturn.tally import Tally
from megatron_multiturn.unfinished import UnfinishedRun, changed_settings

_JOURNAL_SECONDS = 5.0
ENCODING, PLACING = "encoding", "placing"


@dataclass(slots=True, kw_only=True)
class RunState:
    """How far the run is; all of it goes into the journal."""

    part: int = 0  # the part of the input that is being read
    place: FilePlace | None = None  # in it; None: its beginning
    raw_bytes: int = 0  # of all parts
    part_lines: dict[str, int] = dataclasses.field(default_factory=dict)  # of files that are cut
    tally: Tally = dataclasses.field(default_factory=Tally)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RunState":
        place = value["place"]
        return cls(
            **dict(value)
            | {
                "place": None if place is None else FilePlace(**place),
                "tally": Tally.from_json(value["tally"]),
            }
        )


def is_placing(run: UnfinishedRun) -> bool:
    """Whether all that a killed run had left to do was to move its files to their places."""
    with contextlib.suppress(ConfigError):
        journal = run.read()
        return journal is not None and journal.get("phase") == PLACING
    return False


def journal_to_go_on_from(
    run: UnfinishedRun, settings: dict[str, Any], *, overwrite: bool
) -> dict[str, Any] | None:
    """The journal of the run that this one goes on with; None if there is none.

    Raises ConfigError if there is one of another run, unless it may be overwritten.
    """
    try:
        journal = run.read()
        if journal is None:
            return None
        changes = changed_settings(journal["settings"], settings)
        if not changes:
            return journal
    except (ConfigError, KeyError, AttributeError):
        if not overwrite:
            raise
        changes = []
    if not overwrite:
        raise ConfigError(
            f"{run.folder}: is of a run that was not finished, and differs from this one: "
            f"{'; '.join(changes)}. Repeat that command to go on with it, or remove the folder, "
            "or pass --overwrite, to begin again"
        )
    run.forget()
    return None


def journal_of(
    phase: str, settings: dict[str, Any], writer: SessionWriter, progress: RunState
) -> dict[str, Any]:
    return {
        "phase": phase,
        "settings": settings,
        "writer": dataclasses.asdict(writer.state()),
        "progress": progress.to_json(),
        "counts": dataclasses.asdict(writer.counts),
    }


class JournalKeeper:
    """Writes the journal every few seconds, in a thread: to wait for the disk takes its time."""

    def __init__(self, run: UnfinishedRun, writer: SessionWriter) -> None:
        self._run = run
        self._writer = writer
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._said = time.monotonic()

    def keep(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write what state() gives, if it is time; raises what an earlier writing raised."""
        if time.monotonic() - self._said < _JOURNAL_SECONDS:
            return
        if self._pending is not None:
            if not self._pending.done():
                return
            self._pending.result()
        self._said = time.monotonic()
        self._pending = self._thread.submit(self._write, state())

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _write(self, state: dict[str, Any]) -> None:
        self._writer.columns.sync()
        self._run.write(state)
