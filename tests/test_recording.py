"""Recordings hold the same whole tensors whichever way a job is cut and its gradients reduced."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron_jobs import (
    SCRIPT,
    TRAINING_FLAGS,
    JobResult,
    make_dataset,
    read_record,
    relative_difference,
    run_ranks,
)
from session_fixtures import make_record, tiny_sentencepiece

from megatron_multiturn.recording import Part, Recording, RecordingError, save_parts

STEPS = 2
SHARED = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
    "--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.1 "
    "--make-vocab-size-divisible-by 32 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --global-batch-size 8 "
)
GATED = "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear "
MODELS = {
    "tied": SHARED + "--position-embedding-type learned_absolute",
    "untied": SHARED + GATED + "--untie-embeddings-and-output-weights",
    "moe": SHARED + GATED + "--untie-embeddings-and-output-weights --num-experts 4 "
    "--moe-router-topk 2 --moe-router-load-balancing-type none "
    "--moe-token-dispatcher-type alltoall",
}
SHARDED = "--use-distributed-optimizer"
# So small a bucket that there are many of them.
OVERLAPPED = "--overlap-grad-reduce --ddp-bucket-size 1000"
LAZY = f"{SHARDED} {OVERLAPPED} --overlap-param-gather"
TP2, PP2, CP2, EP2 = (
    f"--{kind}-parallel-size 2"
    for kind in ("tensor-model", "pipeline-model", "context", "expert-model")
)
TP2 += " --make-vocab-size-divisible-by 16"  # times the size of the group
SP = "--sequence-parallel"
VPP = "--num-layers-per-virtual-pipeline-stage 1"

CASES = [
    ("tied", 2, OVERLAPPED),
    ("tied", 2, SHARDED),
    ("tied", 2, LAZY),
    ("tied", 4, f"{LAZY} {PP2} {VPP}"),
    ("tied", 4, f"{LAZY} {TP2} {SP}"),
    ("untied", 4, f"{LAZY} --num-distributed-optimizer-instances 2"),
    ("untied", 4, f"{SHARDED} {CP2}"),
    ("untied", 4, f"{LAZY} {TP2} {PP2}"),
    ("moe", 2, EP2),
    ("moe", 4, f"{EP2} {LAZY}"),
    ("moe", 4, f"{EP2} {TP2} {SP} {SHARDED} --expert-tensor-parallel-size 1"),
    ("moe", 4, f"{EP2} {PP2} {SHARDED}"),
]


Job = Callable[..., JobResult]


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    records = [make_record(turns=1 + index % 3) for index in range(40)]
    return make_dataset(tmp_path_factory.mktemp("data"), records, Path(tiny_sentencepiece()))


@pytest.fixture(scope="module")
def job(data_flags: list[str]) -> Job:
    def run(folder: Path, model: str, num_ranks: int, layout: str, **env: str) -> JobResult:
        flags = [*MODELS[model].split(), *layout.split(), *TRAINING_FLAGS, *data_flags]
        flags += ["--train-iters", str(STEPS), "--data-cache-path", str(folder / "cache")]
        run_ranks([str(SCRIPT), *flags], num_ranks, {"RECORD_DIR": str(folder), **env}, folder)
        return read_record(folder, STEPS)

    return run


@pytest.fixture(scope="module")
def one_rank(
    job: Job, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, JobResult]]:
    """Folder and result of a model's run on one rank; run once."""

    @functools.cache
    def run(model: str) -> tuple[Path, JobResult]:
        folder = tmp_path_factory.mktemp(model)
        return folder, job(folder, model, 1, "")

    return run


@pytest.mark.distributed
@pytest.mark.parametrize(("model", "num_ranks", "layout"), CASES)
def test_a_job_of_any_layout_records_the_same(
    model: str,
    num_ranks: int,
    layout: str,
    job: Job,
    one_rank: Callable[[str], tuple[Path, JobResult]],
    tmp_path: Path,
) -> None:
    folder, expected = one_rank(model)
    initial = str(folder / "initial")
    result = job(tmp_path, model, num_ranks, layout, INITIAL_PARAMETERS=initial)
    for ours, theirs in zip(result.gradients, expected.gradients, strict=True):
        assert relative_difference(ours, theirs) < 1e-5
    assert relative_difference(result.parameters, expected.parameters) < 1e-5
    for name in (*(f"gradients-{step}" for step in range(STEPS)), "parameters"):
        assert Recording(tmp_path / name).replica_difference()[0] < 1e-6


@pytest.mark.distributed
@pytest.mark.parametrize("mutant", ["local-gradients", "stale-parameters"])
def test_what_a_rank_holds_by_itself_is_not_it(
    mutant: str, job: Job, one_rank: Callable[[str], tuple[Path, JobResult]], tmp_path: Path
) -> None:
    """The distributed optimizer leaves each rank with a part only: the tests above would see it."""
    folder, expected = one_rank("tied")
    result = job(
        tmp_path, "tied", 2, LAZY, INITIAL_PARAMETERS=str(folder / "initial"), MUTANT=mutant
    )
    if mutant == "local-gradients":
        assert relative_difference(result.gradients[0], expected.gradients[0]) > 1e-2
        assert Recording(tmp_path / "gradients-0").replica_difference()[0] > 1e-2
    else:
        assert relative_difference(result.gradients[0], expected.gradients[0]) < 1e-5
        assert relative_difference(result.parameters, expected.parameters) > 1e-4


def make_part(begin: tuple[int, ...], data: torch.Tensor, *, is_main: bool = True) -> Part:
    """A part of `w`, (4, 6), in which each layer's parameter is flat (6,) to the model."""
    end = tuple(b + n for b, n in zip(begin, (1, data.numel()), strict=True))
    return Part(name="w", whole_shape=(4, 6), begin=begin, end=end, data=data, is_main=is_main)


WHOLE = torch.arange(24, dtype=torch.float32).view(4, 6) - 7


def save_whole(folder: Path, *, without: tuple[int, int] | None = None) -> None:
    """`WHOLE` by two ranks, each with half of every layer."""
    for rank in (0, 1):
        columns = slice(3 * rank, 3 * rank + 3)
        parts = [make_part((row, 3 * rank), WHOLE[row, columns]) for row in range(4)]
        save_parts(folder, [p for p in parts if p.begin != without], rank=rank)


def test_parts_make_up_the_whole(tmp_path: Path) -> None:
    save_whole(tmp_path)
    recording = Recording(tmp_path)
    assert list(recording) == ["w"]
    assert torch.equal(recording["w"], WHOLE)
    assert torch.equal(recording.read("w", begin=(1, 2), end=(3, 5)), WHOLE[1:3, 2:5])


def test_a_missing_part_is_an_error(tmp_path: Path) -> None:
    save_whole(tmp_path, without=(2, 3))
    recording = Recording(tmp_path)
    assert torch.equal(recording.read("w", begin=(2, 0), end=(3, 3)), WHOLE[2:3, :3])
    with pytest.raises(RecordingError, match=r"of w, 21 elements were saved where 24 lie"):
        recording["w"]


def test_a_part_saved_twice_is_an_error(tmp_path: Path) -> None:
    save_whole(tmp_path)
    save_parts(tmp_path, [make_part((0, 0), WHOLE[0])], rank=2)
    with pytest.raises(RecordingError, match=r"of w, 30 elements were saved"):
        Recording(tmp_path)["w"]


def test_unknown_names_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="nothing is recorded there"):
        Recording(tmp_path)
    save_whole(tmp_path)
    with pytest.raises(RecordingError, match="no rank saved v"):
        Recording(tmp_path).read("v", begin=(0,), end=(1,))


@pytest.mark.parametrize(
    ("replica", "difference"),
    [
        (WHOLE[1], 0.0),
        (WHOLE[1] * 1.25, 0.2),
        (-WHOLE[1].roll(1), 2 * 9 / (31 * 6) ** 0.5),
        (torch.full((6,), torch.nan), torch.inf),
    ],
)
def test_a_replica_that_differs_is_found(
    replica: torch.Tensor, difference: float, tmp_path: Path
) -> None:
    save_whole(tmp_path)
    save_parts(tmp_path, [make_part((1, 0), replica, is_main=False)], rank=2)
    found, name = Recording(tmp_path).replica_difference()
    assert found == pytest.approx(difference)
    assert name == ("w" if difference else "")


def test_a_view_is_saved_without_what_it_looks_on(tmp_path: Path) -> None:
    large = torch.zeros(1_000_000)
    save_parts(tmp_path, [make_part((0, 0), large[:6])], rank=0)
    assert (tmp_path / "rank-0.pt").stat().st_size < 10_000
