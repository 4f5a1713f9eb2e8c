"""What can be known to be wrong with the data of a run before its model is built.

Megatron builds the model first and the datasets afterwards, which at scale is minutes later, and
each node reads its own files. So once there are process groups one rank of every node looks at
them, and all ranks hear of what any has found.
"""

import argparse
import socket
from collections.abc import Sequence

import torch
from megatron.core.datasets.utils import Split

from megatron_multiturn import megatron_compat as megatron
from megatron_multiturn.dataset import MultiTurnDataset, MultiTurnDatasetConfig, check_sessions
from megatron_multiturn.epochs import training_blend, training_sessions
from megatron_multiturn.errors import ConfigError, MultiTurnError
from megatron_multiturn.provider import dataset_prefixes, planning_config, require_data
from megatron_multiturn.vocabulary import tokenizer_fingerprint

Identity = dict[str, str]  # what must be alike on all nodes: by a name of it


def check_data(args: argparse.Namespace) -> None:
    """Look at the datasets of `--dataset-provider multiturn`; collective over all ranks.

    Raises ConfigError, the same on every rank, if a node lacks a dataset or has another one than
    the others, if one was made with another tokenizer, or if no session fits a row.
    """
    config = planning_config(args)
    require_data(config)
    name = f"{socket.gethostname()} (rank {args.rank})"
    found = (name, _look(config, args)) if args.local_rank == 0 else None
    of_ranks: list[tuple[str, str | Identity] | None]
    of_ranks = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, found)
    _compare([one for one in of_ranks if one is not None])


def _look(config: MultiTurnDatasetConfig, args: argparse.Namespace) -> str | Identity:
    """What this node has, or what is wrong with it."""
    tokenizer = megatron.get_tokenizer()
    config.tokenizer_identity = tokenizer_fingerprint(tokenizer, args.tokenizer_type)
    training = training_blend(config)
    identity: Identity = {}
    try:
        for prefix in dataset_prefixes(config):
            store = MultiTurnDataset.build_low_level_dataset(prefix, config)
            sessions = training_sessions(store, config)
            if training is not None and prefix in training[0] and sessions:
                check_sessions(store, sessions, Split.train.name, config)
            manifest = store.manifest
            identity |= {
                f"sessions of {prefix}": f"{manifest.counts.sessions:,}",
                f"tokens of {prefix}": f"{manifest.counts.tokens:,}",
                f"content of {prefix}.idx": manifest.idx_sha256[:12],
                f"weights of turns of {prefix}": str(manifest.turn_weights),
            }
    except MultiTurnError as error:
        return str(error)
    return identity


def _compare(nodes: Sequence[tuple[str, str | Identity]]) -> None:
    """Raise ConfigError unless all nodes have the same and nothing is wrong.

    nodes: the name of each, and what was found there.
    """
    errors: dict[str, list[str]] = {}
    for name, found in nodes:
        if isinstance(found, str):
            errors.setdefault(found, []).append(name)
    if errors:
        everywhere = len(errors) == 1 and len(next(iter(errors.values()))) == len(nodes)
        raise ConfigError(
            "\n".join(
                error if everywhere else f"on {_some(names)}, of {len(nodes)} nodes: {error}"
                for error, names in errors.items()
            )
        )
    first_name, expected = nodes[0]
    for name, found in nodes[1:]:
        if found != expected:
            assert isinstance(expected, dict)
            assert isinstance(found, dict)
            lines = [
                f"  {what}: {value} on {first_name}, {found.get(what)} on {name}"
                for what, value in expected.items()
                if found.get(what) != value
            ]
            raise ConfigError(
                "nodes have different data:\n" + "\n".join(lines) + "\ncopy one and the same "
                "dataset, all of .bin, .idx and .json, to every node"
            )


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
