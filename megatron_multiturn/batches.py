"""Where global batches begin and end in the rows of a run, also when their size grows.

Rows are numbered from the first that a run trains on. Megatron takes them in order, so that the
batch size at a row depends on nothing but how many rows came before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_multiturn.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Rows that lie one after the other in batches of one size: whole batches, or part of one."""

    batch_size: int
    begin: int  # the first row
    num_rows: int
    offset: int = 0  # rows of its batch that lie before `begin`

    @property
    def is_whole(self) -> bool:
        """Whether it is made of whole batches; else it is a part of one."""
        return self.offset == 0 and self.num_rows % self.batch_size == 0


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """(first row, batch size) from which on batches have that size; ascending, from row 0 on."""

    steps: tuple[tuple[int, int], ...]

    @classmethod
    def from_thresholds(cls, thresholds: Sequence[tuple[int, int]]) -> "BatchSchedule":
        """From (rows consumed, batch size): a size holds once so many rows are consumed.

        The last batch of the size before may end beyond the threshold. Worked example: with
        (0, 4), (6, 8) the batches begin at rows 0, 4, 8, 16, 24, ...
        """
        if not thresholds or thresholds[0][0] != 0 or min(size for _, size in thresholds) < 1:
            raise ConfigError(f"batch sizes {thresholds}: they must be positive, the first from 0")
        steps = [(0, thresholds[0][1])]
        for threshold, size in thresholds[1:]:
            first, before = steps[-1]
            reached = first + -(-(threshold - first) // before) * before
            if reached <= first:  # its threshold was passed by the batch that reached the last one
                steps.pop()
                reached = first
            steps.append((reached, size))
        return cls(tuple(steps))

    def batch_of(self, row: int) -> tuple[int, int]:
        """(first row, size) of the batch that holds `row`."""
        begin, size = self.steps[0]
        for first, step_size in self.steps[1:]:
            if first > row:
                break
            begin, size = first, step_size
        return row - (row - begin) % size, size

    def __str__(self) -> str:
        return ", ".join(f"{size} from row {first:,}" for first, size in self.steps)

    def sizes(self) -> list[int]:
        """The different batch sizes, ascending."""
        return sorted({size for _, size in self.steps})

    def end_of_batches(self, row: int, num_batches: int) -> int:
        """The row after the last of `num_batches` batches, the first of which begins at `row`."""
        last_step, last_size = self.steps[-1]
        for done in range(num_batches):
            if row >= last_step:
                return row + (num_batches - done) * last_size
            row += self.batch_of(row)[1]
        return row

    def stretches(self, begin: int, stop: int) -> list[Stretch]:
        """The rows `begin` to `stop`, cut where whole batches begin and end."""
        found: list[Stretch] = []
        while begin < stop:
            first, size = self.batch_of(begin)
            step_stop = min((step for step, _ in self.steps if step > begin), default=stop)
            whole = (min(stop, step_stop) - begin) // size
            if first < begin or not whole:
                num_rows = min(first + size, stop) - begin
            else:
                num_rows = whole * size
            found.append(
                Stretch(batch_size=size, begin=begin, num_rows=num_rows, offset=begin - first)
            )
            begin += num_rows
        return found
