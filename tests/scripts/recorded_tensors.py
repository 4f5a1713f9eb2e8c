"""Tensors that the ranks of a job saved in parts, put together again."""

from pathlib import Path

import torch

# A rank saves [(name, shape of the whole tensor, slices where the part lies, the part)].
Part = tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]


def save_parts(folder: Path, rank: int, parts: list[Part]) -> None:
    """Save one rank's parts."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(parts, folder / f"rank-{rank}.pt")


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor by its name, from the parts of all ranks; each element must be in a part."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("rank-*.pt")):
        for name, shape, where, part in torch.load(path, weights_only=False):
            whole = tensors.setdefault(name, torch.full(shape, torch.nan))
            whole[where] = part.view(whole[where].shape)
    for name, whole in tensors.items():
        assert not whole.isnan().any(), f"{name} is incomplete"
    return tensors
