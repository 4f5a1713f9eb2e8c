"""Parameters and reduced gradients of a distributed model as whole tensors, on any layout.

Megatron's checkpoint code knows which part of which whole tensor each rank holds, and by which
name that tensor goes on every layout. A recording is a folder of such parts:

    rank-N.pt   a list of dicts: name, whole_shape, begin, end (where the part lies in the whole
                tensor), data (host float32; None in a replica) and fingerprint

Of what several ranks hold alike, one rank saves the data, and the others a fingerprint of theirs,
by which `Recording.replica_difference` finds ranks that have drifted apart.
"""

import bisect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_multiturn.errors import MultiTurnError


class RecordingError(MultiTurnError):
    """A recording lacks a part of a tensor, or holds one that the model does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A box of a whole tensor; axis i goes from `begin[i]` to `end[i]`.

    A parameter of a layer is a part of one tensor over all layers, `whole_shape[0]` of them, and
    likewise with the experts of a layer.
    """

    name: str  # Megatron's global one, equal on every layout
    whole_shape: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    data: Tensor  # on the rank that holds it, in the shape that the model gives it
    is_main: bool  # False where another rank holds the same and saves it


def parameter_parts(model: Sequence[Any]) -> list[Part]:
    """This rank's parts of the parameters and buffers; their data are views of them.

    model: the wrapped chunks, as Megatron's `train_step` takes them. Collective: parameters that
    wait to be gathered until the next forward pass (`--overlap-param-gather`) are gathered now.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)
    return _parts(model)


def gradient_parts(model: Sequence[Any], *, scale: float = 1.0) -> list[Part]:
    """This rank's parts of the gradients times `scale`, float32 on the host.

    To be called when the gradients are reduced and before the optimizer takes them, which finds
    them unchanged. Collective. Parameters without a gradient, and buffers, are left out.
    """
    gradients = [(p, g.mul_(scale)) for p, g in _whole_gradients(model)]
    gradients.sort(key=lambda pair: pair[0].data_ptr())
    starts = [parameter.data_ptr() for parameter, _ in gradients]
    parts = []
    # The checkpoint code describes the data of the parameters, by views where it cuts them (the
    # halves of a gated layer, say). The same view of the gradient is the part of the gradient.
    for part in _parts(model):
        position = bisect.bisect_right(starts, part.data.data_ptr()) - 1
        if position < 0:
            continue
        parameter, gradient = gradients[position]
        offset, rest = divmod(part.data.data_ptr() - starts[position], parameter.element_size())
        if offset >= parameter.numel():
            continue
        assert rest == 0
        assert parameter.is_contiguous()
        view = gradient.as_strided(part.data.shape, part.data.stride(), offset)
        parts.append(replace(part, data=view))
    return parts


def save_parts(folder: Path, parts: Sequence[Part], *, rank: int) -> None:
    """Save one rank's parts; the other ranks save into the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "name": part.name,
            "whole_shape": part.whole_shape,
            "begin": part.begin,
            "end": part.end,
            "data": _host_copy(part.data) if part.is_main else None,
            "fingerprint": _fingerprint(part.data),
        }
        for part in parts
    ]
    temporary = folder / f".rank-{rank}.pt"
    with temporary.open("wb") as file:
        torch.save(records, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / f"rank-{rank}.pt")


class Recording(Mapping[str, Tensor]):
    """The tensors that the ranks of a job saved in a folder, by name, each whole, float32.

    Files are mapped into memory, and a tensor is put together when it is asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("rank-*.pt")):
            for part in torch.load(path, map_location="cpu", mmap=True, weights_only=True):
                self._parts.setdefault(part["name"], []).append(part)
        if not self._parts:
            raise RecordingError(f"{folder}: nothing is recorded there")

    def __getitem__(self, name: str) -> Tensor:
        shape = self._parts[name][0]["whole_shape"]
        return self.read(name, begin=(0,) * len(shape), end=shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def read(self, name: str, *, begin: Sequence[int], end: Sequence[int]) -> Tensor:
        """A box of a tensor; raises RecordingError unless each element was saved exactly once."""
        if name not in self._parts:
            raise RecordingError(f"{self._folder}: no rank saved {name}")
        box = torch.empty([stop - start for start, stop in zip(begin, end, strict=True)])
        num_saved = 0
        for part in self._parts[name]:
            low = [max(pair) for pair in zip(begin, part["begin"], strict=True)]
            high = [min(pair) for pair in zip(end, part["end"], strict=True)]
            if part["data"] is None or any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            shape = [b - a for a, b in zip(part["begin"], part["end"], strict=True)]
            source = part["data"].view(shape)[_slices(low, high, part["begin"])]
            box[_slices(low, high, begin)] = source
            num_saved += source.numel()
        if num_saved != box.numel():
            raise RecordingError(
                f"{self._folder}: of {name}, {num_saved:,} elements were saved where "
                f"{box.numel():,} lie from {tuple(begin)} to {tuple(end)}; the recording is of "
                "another model, or the files of some ranks are missing"
            )
        return box

    def replica_difference(self) -> tuple[float, str]:
        """How far a replica is from what was saved of it, the largest over all, and its name.

        The relative difference of their norms, or of their sums by the largest sum that n
        elements of that norm can have, sqrt(n) times the norm; inf if one is no number.
        """
        largest, name = 0.0, ""
        for part in chain.from_iterable(self._parts.values()):
            if part["data"] is not None:
                continue
            whole = self.read(part["name"], begin=part["begin"], end=part["end"])
            difference = _distance(_fingerprint(whole), part["fingerprint"], whole.numel())
            if difference > largest:
                largest, name = difference, part["name"]
        return largest, name


def whole_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a recording by its name, read at once."""
    return dict(Recording(folder))


def load_parameters(model: Sequence[Any], optimizer: Any, recording: Recording) -> None:
    """Begin with the parameters that a job of any layout recorded.

    Raises RecordingError if the recording lacks one, or has it in another shape.
    """
    parts = parameter_parts(model)
    modules = [_unwrapped(chunk) for chunk in model]
    owned = {_address(t) for m in modules for t in chain(m.parameters(), m.buffers())}
    with torch.no_grad():
        for part in parts:
            assert _address(part.data) in owned, f"{part.name} is a copy; it cannot be loaded"
            saved = recording.read(part.name, begin=part.begin, end=part.end)
            part.data.copy_(saved.view_as(part.data))
    optimizer.reload_model_params()


def _parts(model: Sequence[Any]) -> list[Part]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        apply_factories,
        is_main_replica,
    )

    states = [_unwrapped(chunk).sharded_state_dict() for chunk in model]
    for state in states:
        apply_factories(state)
    parts = []
    for sharded in nested_values(states):
        if not isinstance(sharded, ShardedTensor):
            continue  # other state of a module, such as the scales of 8-bit floats
        begin = sharded.global_offset
        sizes = [1] * sharded.prepend_axis_num + list(sharded.local_shape)
        parts.append(
            Part(
                name=sharded.key,
                whole_shape=tuple(sharded.global_shape),
                begin=tuple(begin),
                end=tuple(start + size for start, size in zip(begin, sizes, strict=True)),
                data=sharded.data.detach(),
                is_main=is_main_replica(sharded.replica_id),
            )
        )
    return parts


def _whole_gradients(model: Sequence[Any]) -> Iterator[tuple[Any, Tensor]]:
    """(parameter, its whole reduced gradient: float32, on the host), of those that have one.

    The distributed optimizer leaves a rank only its share of each bucket reduced: the buckets,
    padding included, are cut evenly over a data parallel group, which for experts is one of
    their own. Each bucket is gathered into memory of its own.
    """
    for chunk in model:
        for group in chain(chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
            for bucket in group.buckets:
                gradients = [p.main_grad.float() for p in bucket.params_list]
                if group.ddp_config.use_distributed_optimizer:
                    ranks = group.intra_distributed_optimizer_instance_group
                    gradients = _gather_bucket(bucket, gradients, ranks)
                for parameter, gradient in zip(bucket.params_list, gradients, strict=True):
                    yield parameter, _host_copy(gradient)


def _gather_bucket(bucket: Any, gradients: Sequence[Tensor], ranks: Any) -> list[Tensor]:
    """The gradients of a bucket's parameters, each element from the rank that has it reduced."""
    flat = torch.zeros_like(bucket.grad_data, dtype=torch.float32)
    places = [slice(*bucket.param_to_index[parameter]) for parameter in bucket.params_list]
    for place, gradient in zip(places, gradients, strict=True):
        flat[place] = gradient.flatten()
    own_share = flat.chunk(ranks.size())[ranks.rank()].clone()
    torch.distributed.all_gather_into_tensor(flat, own_share, group=ranks)
    return [flat[place].view_as(g) for place, g in zip(places, gradients, strict=True)]


def _unwrapped(chunk: Any) -> Any:
    from megatron.core.utils import unwrap_model

    return unwrap_model(chunk)


def _address(tensor: Tensor) -> int:
    """Equal for tensors that are views of one memory."""
    return tensor.untyped_storage().data_ptr()


def _host_copy(tensor: Tensor) -> Tensor:
    """Always a copy, with memory of its own: what is saved of a view is all that it looks on."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _fingerprint(tensor: Tensor) -> tuple[float, float]:
    """(sum, Euclidean norm), in float64 and on the host: equal tensors have equal ones."""
    exact = tensor.detach().to("cpu", torch.float64).contiguous()
    return float(exact.sum()), float(exact.norm())


def _distance(ours: Sequence[float], theirs: Sequence[float], num_elements: int) -> float:
    """Relative difference of two fingerprints, see `Recording.replica_difference`."""
    if not math.isfinite(ours[1] + theirs[1]):
        return math.inf
    norm = max(ours[1], theirs[1])
    by_sum = abs(ours[0] - theirs[0]) / math.sqrt(num_elements)
    return max(by_sum, abs(ours[1] - theirs[1])) / norm if norm else 0.0


def _slices(begin: Sequence[int], end: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """The box from `begin` to `end` in an array whose first element lies at `origin`."""
    return tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, origin, strict=True))
