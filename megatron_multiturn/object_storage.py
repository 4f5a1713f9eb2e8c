"""Datasets in object storage: the index is copied to this node, tokens are read where they lie."""

import hashlib
from pathlib import Path

from megatron_multiturn.errors import DatasetError
from megatron_multiturn.manifest import manifest_path, read_manifest
from megatron_multiturn.shared_files import atomic, locked

_SCHEMES = ("s3://", "msc://")


def is_in_object_storage(prefix: str) -> bool:
    """Whether `prefix` is of a kind that Megatron reads from object storage."""
    return prefix.startswith(_SCHEMES)


def fetch_index(prefix: str, cache_folder: str | None) -> str:
    """Copy the manifest and the .idx of `prefix` (s3:// or msc://) below `cache_folder`.

    One process a node copies, the others wait. Returns the prefix of the copies, which names the
    content of the manifest, so that a dataset that has changed is copied anew. Raises
    DatasetError without a folder, or if an object cannot be copied or the .idx is cut off.
    """
    if cache_folder is None:
        raise DatasetError(
            f"{prefix} lies in object storage: pass --object-storage-cache-path with a folder on "
            "this node for its index"
        )
    path = Path(cache_folder) / prefix.partition("://")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f"{path.name}.lock"), f"copy the index of {prefix}"):
        newest = path.with_name(f"{path.name}.json")
        with atomic(newest) as temporary:
            _download(manifest_path(prefix), temporary)
        digest = hashlib.sha256(newest.read_bytes()).hexdigest()[:16]
        local_prefix = f"{path}-{digest}"
        if not Path(manifest_path(local_prefix)).exists():
            expected = read_manifest(str(path)).idx_bytes
            with atomic(Path(f"{local_prefix}.idx")) as temporary:
                _download(f"{prefix}.idx", temporary)
                found = temporary.stat().st_size
                if found != expected:
                    raise DatasetError(
                        f"{prefix}.idx: {found:,} bytes, but the manifest says {expected:,}: the "
                        "file is cut off or of another run; copy it again or preprocess again"
                    )
            with atomic(Path(manifest_path(local_prefix))) as temporary:
                temporary.write_bytes(newest.read_bytes())
    return local_prefix


def _download(remote: str, local: Path) -> None:
    from megatron_multiturn.megatron_compat import download_object

    try:
        download_object(remote, str(local))
    except Exception as error:  # each client raises errors of its own
        raise DatasetError(
            f"{remote}: cannot be read ({type(error).__name__}: {error}); a dataset is PREFIX.bin, "
            ".idx and .json, all three in the same place"
        ) from error
