"""From a checkpoint of stock Megatron's pre-training to packed sessions, and back."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from megatron_jobs import MODEL_FLAGS, SCRIPT, make_dataset, run_ranks
from session_fixtures import make_record, tiny_sentencepiece

pytestmark = pytest.mark.distributed

STOCK_SCRIPT = SCRIPT.with_name("stock_rows.py")
FLAGS = (
    "--seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 4 "
    "--lr 1e-2 --min-lr 1e-2 --lr-decay-style constant --weight-decay 0 --seed 7 --num-workers 0 "
    "--split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1 --no-one-logger "
    "--save-interval 100 --override-opt-param-scheduler"
).split()
STOCK = ["--dataset-provider", "megatron", "--no-create-attention-mask-in-dataloader"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    records = [make_record(turns=1 + n % 5) for n in range(60)]
    flags = make_dataset(folder, records, Path(tiny_sentencepiece()))
    return [*flags, "--data-cache-path", str(folder / "cache")]


def losses(folder: Path, flags: Sequence[str]) -> dict[int, float]:
    """Train on one rank; step -> lm loss."""
    arguments = [*MODEL_FLAGS, *FLAGS, *flags]
    if "megatron" in flags:
        arguments = [str(STOCK_SCRIPT), *arguments]
    run_ranks(arguments, 1, {}, folder)
    log = (folder / "rank-0.log").read_text()
    return {
        int(step): float(loss)
        for step, loss in re.findall(r"iteration +(\d+)/.*?\| lm loss: (\S+) \|", log)
    }


def saved(*names: Path) -> list[str]:
    save, load = names if len(names) == 2 else (names[0], names[0])
    return ["--save", str(save), "--load", str(load)]


def test_stock_checkpoint_is_finetuned_resumed_and_taken_back(
    tmp_path: Path, data: list[str]
) -> None:
    stock, ours, unbroken = (tmp_path / name for name in ("stock", "ours", "unbroken"))
    pretrained = [*STOCK, *data, "--train-iters", "3", "--save", str(stock)]
    first = losses(tmp_path / "1", pretrained)
    assert set(first) == {1, 2, 3}
    # Its rows consumed are none of ours: going on would skip as many.
    with pytest.raises(AssertionError, match=r"does not say which rows it was trained on.*--finet"):
        losses(tmp_path / "2", [*data, "--train-iters", "4", *saved(ours, stock)])

    finetuned = [*data, "--train-iters", "4", "--pretrained-checkpoint", str(stock)]
    part = losses(tmp_path / "3", [*finetuned, *saved(ours), "--exit-interval", "2"])
    assert set(part) == {1, 2}  # its own count of steps, its own rows from the first
    assert part[1] < first[1] - 0.1  # and the weights of the other
    other_way = [*data, "--train-iters", "1", "--load", str(stock), "--finetune"]
    assert losses(tmp_path / "4", other_way)[1] == part[1]

    # The same command goes on from what it has saved, where the unbroken run would be.
    rest = losses(tmp_path / "5", [*finetuned, *saved(ours)])
    wanted = losses(tmp_path / "6", [*finetuned, *saved(unbroken)])
    assert rest[3] == wanted[3]
    # Megatron averages the second step of a process with its first.
    assert rest[4] == pytest.approx((wanted[3] + wanted[4]) / 2, rel=1e-6)

    returned = [*STOCK, *data, "--train-iters", "6", *saved(tmp_path / "back", ours)]
    back = losses(tmp_path / "7", returned)
    assert set(back) == {5, 6}  # with the optimizer's state and the count of steps
    assert back[5] < first[1] - 0.1
