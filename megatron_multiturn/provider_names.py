"""The dataset providers that installed distributions offer for `--dataset-provider NAME`."""

from importlib.metadata import EntryPoint, entry_points

PROVIDERS_GROUP = "megatron_multiturn.dataset_providers"  # of entry points


def registered_providers() -> list[EntryPoint]:
    """Those offered as entry points, by the order of their names."""
    return sorted(entry_points(group=PROVIDERS_GROUP), key=lambda point: point.name)
