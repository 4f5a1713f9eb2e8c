"""Datasets in object storage, through Megatron's own readers, with a folder as the storage."""

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core import msc_utils
from megatron.core.datasets import indexed_dataset, object_storage_utils
from test_dataset import SEQUENCE_LENGTH, make_config, make_dataset, write_dataset

from megatron_multiturn.errors import DatasetError
from megatron_multiturn.store import SessionStore

NUM_SESSIONS = 40


class FakeS3:
    """boto3 and its S3 client over a folder of buckets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ranges: list[str] = []
        self.downloads: list[str] = []

    def client(self, service: str) -> "FakeS3":
        assert service == "s3"
        return self

    def download_file(self, bucket: str, key: str, local: str) -> None:
        self.downloads.append(key)
        shutil.copy(self.root / bucket / key, local)

    def get_object(self, Bucket: str, Key: str, Range: str) -> dict[str, Any]:  # noqa: N803
        self.ranges.append(Range)
        first, last = map(int, Range.removeprefix("bytes=").split("-"))
        data = (self.root / Bucket / Key).read_bytes()[first : last + 1]
        return {"Body": io.BytesIO(data)}

    def close(self) -> None:
        pass


class FakeMultiStorageClient:
    """The multistorageclient package over the same folder."""

    class types:  # noqa: N801
        class Range:
            def __init__(self, offset: int, size: int) -> None:
                self.offset, self.size = offset, size

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, path: str) -> Path:
        return self.root / path.removeprefix("msc://")

    def download_file(self, remote: str, local: str) -> None:
        shutil.copy(self._path(remote), local)

    def resolve_storage_client(self, path: str) -> tuple[Any, str]:
        return self, path

    def read(self, path: str, byte_range: Any) -> bytes:
        data = self._path(path).read_bytes()
        return data[byte_range.offset : byte_range.offset + byte_range.size]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    (root / "bucket" / "chat").mkdir(parents=True)
    write_dataset(root / "bucket" / "chat" / "sessions", NUM_SESSIONS)
    return root


@pytest.fixture
def s3(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    fake = FakeS3(bucket)
    for module in (object_storage_utils, indexed_dataset):
        monkeypatch.setattr(module, "boto3", fake, raising=False)
    msc = FakeMultiStorageClient(bucket)
    monkeypatch.setattr(msc_utils, "msc", msc)
    monkeypatch.setattr(msc_utils.MultiStorageClientFeature, "_enabled", True)
    return fake


@pytest.mark.parametrize("scheme", ["s3", "msc"])
def test_rows_are_those_of_the_files(scheme: str, s3: FakeS3, bucket: Path, tmp_path: Path) -> None:
    prefix = f"{scheme}://bucket/chat/sessions"
    config = make_config(
        tmp_path / "plans", prefix, object_storage_cache_path=str(tmp_path / "cache")
    )
    local_prefix = str(bucket / "bucket" / "chat" / "sessions")
    local = make_dataset(make_config(tmp_path / "local", local_prefix), local_prefix)
    remote = make_dataset(config, prefix)
    copies = [remote, pickle.loads(pickle.dumps(remote))]  # what a loader worker gets
    assert len(remote) == len(local) > 5
    for row in range(len(local)):
        for dataset in copies:
            found = dataset[row]
            assert found["tokens"].shape == (SEQUENCE_LENGTH,)
            for name, expected in local[row].items():
                np.testing.assert_array_equal(found[name], expected)


def test_what_is_asked_for_is_what_is_needed(s3: FakeS3, tmp_path: Path) -> None:
    store = SessionStore.open("s3://bucket/chat/sessions", index_cache=str(tmp_path))
    session = store.session(7)
    first, last = map(int, s3.ranges[-1].removeprefix("bytes=").split("-"))
    assert last - first + 1 == 2 * len(session.tokens)


def test_the_index_is_copied_once_and_anew_when_it_changes(
    s3: FakeS3, bucket: Path, tmp_path: Path
) -> None:
    prefix = "s3://bucket/chat/sessions"
    stores = [SessionStore.open(prefix, index_cache=str(tmp_path)) for _ in range(3)]
    assert s3.downloads.count("chat/sessions.idx") == 1
    assert len({store.local_prefix for store in stores}) == 1
    write_dataset(bucket / "bucket" / "chat" / "other", 12)
    other = "s3://bucket/chat/other"
    assert SessionStore.open(other, index_cache=str(tmp_path)).num_sessions == 12
    write_dataset(tmp_path / "newer", 15)
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"newer{suffix}").replace(bucket / "bucket" / "chat" / f"other{suffix}")
    assert SessionStore.open(other, index_cache=str(tmp_path)).num_sessions == 15
    assert s3.downloads.count("chat/other.idx") == 2


def test_the_plan_lies_beside_the_copy_of_the_index(s3: FakeS3, tmp_path: Path) -> None:
    prefix = "s3://bucket/chat/sessions"
    config = make_config(tmp_path, prefix, object_storage_cache_path=str(tmp_path / "cache"))
    config.path_to_cache = None
    make_dataset(config, prefix)
    assert list((tmp_path / "cache" / "bucket" / "chat").glob("sessions-*.plans/plan-*.json"))


def test_without_a_folder_for_the_index(s3: FakeS3) -> None:
    with pytest.raises(DatasetError, match="pass --object-storage-cache-path"):
        SessionStore.open("s3://bucket/chat/sessions")


def test_what_is_not_there(s3: FakeS3, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"s3://bucket/chat/none.json: cannot be read .FileNot"):
        SessionStore.open("s3://bucket/chat/none", index_cache=str(tmp_path))
    assert not list(tmp_path.rglob("*.json"))


def test_an_index_that_is_cut_off(s3: FakeS3, bucket: Path, tmp_path: Path) -> None:
    prefix = bucket / "bucket" / "chat" / "cut"
    write_dataset(prefix, 12)
    index = prefix.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-1])
    expected = json.loads(prefix.with_suffix(".json").read_text())["idx_bytes"]
    with pytest.raises(DatasetError, match=f"manifest says {expected:,}"):
        SessionStore.open("s3://bucket/chat/cut", index_cache=str(tmp_path))
    assert not list(tmp_path.rglob("*.idx"))
