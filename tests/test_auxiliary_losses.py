"""MoE and MTP losses keep the gradient size that stock Megatron gives them on the same rows.

The reference (tests/scripts/stock_session_rows.py) is stock Megatron in every respect. Each row
holds one session, all sessions have as many turns and as many targets, and each step is the whole
data set, so that stock Megatron's mean over micro-batches is the mean over turns, or over target
tokens. The gradients hold the main loss and the auxiliary losses together.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron_jobs import (
    SCRIPT,
    make_dataset,
    read_record,
    relative_difference,
    train_and_record,
    train_sentencepiece,
    word_sessions,
)

STEPS = 2
NUM_SESSIONS = 8
TURN_LENGTHS = (1, 9, 22)
FLAGS = f"--seq-length 64 --max-position-embeddings 64 --global-batch-size {NUM_SESSIONS}"
STOCK_SCRIPT = SCRIPT.with_name("stock_session_rows.py")
MUTANTS_SCRIPT = SCRIPT.with_name("mutants.py")
TOLERANCE = 1e-5

MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 "
    "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type "
)
# Coefficients so large that a wrong size cannot hide.
MODELS = {
    "aux_loss": f"{MOE} aux_loss --moe-aux-loss-coeff 0.5",
    "seq_aux_loss": f"{MOE} seq_aux_loss --moe-aux-loss-coeff 0.5",
    "global_aux_loss": f"{MOE} global_aux_loss --moe-aux-loss-coeff 0.5",
    "z-loss": f"{MOE} none --moe-z-loss-coeff 0.1",
    "router": f"{MOE} aux_loss seq_aux_loss --moe-aux-loss-coeff 0.3 0.2 --moe-z-loss-coeff 0.1",
    "MTP": "--mtp-num-layers 2 --mtp-loss-scaling-factor 0.5",
    # The layer of multi-token prediction is like the last one. Without experts there, for stock
    # Megatron shifts the padding of that layer's router too.
    "all": f"{MOE} aux_loss seq_aux_loss --moe-aux-loss-coeff 0.3 0.2 --moe-z-loss-coeff 0.1 "
    "--moe-layer-freq [1,0] --mtp-num-layers 1 --mtp-loss-scaling-factor 0.5",
}


def sessions() -> list[dict[str, object]]:
    """Three turns each, in another order of lengths."""
    return word_sessions(
        [[TURN_LENGTHS[(index + turn) % 3] for turn in range(3)] for index in range(NUM_SESSIONS)]
    )


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    texts = [m["content"] for s in sessions() for m in s["messages"]]  # type: ignore[attr-defined]
    flags = make_dataset(folder, sessions(), train_sentencepiece(folder, texts, vocab_size=60))
    check_premises(flags[-1])
    return flags


def check_premises(prefix: str) -> None:
    from megatron_multiturn.store import SessionStore

    store = SessionStore.open(prefix)
    lengths = store.session_lengths()
    assert len(lengths) == NUM_SESSIONS
    assert len(set(lengths.tolist())) == 1, "as many targets each"
    assert 32 < lengths[0] < 60, "one session a row, and padding in each"


@pytest.fixture(scope="module")
def stock(data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of stock Megatron's run with the flags; the same job is run once."""
    done: dict[tuple[object, ...], Path] = {}

    def run(flags: str, weights: str = "turn", num_ranks: int = 1) -> Path:
        key = (flags, weights, num_ranks)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("stock")
            train_and_record(
                done[key],
                [*data_flags, *FLAGS.split(), *flags.split(), "--dataset-provider", "megatron"],
                train_iters=STEPS,
                num_ranks=num_ranks,
                script=STOCK_SCRIPT,
                env={"STOCK_WEIGHTS": weights},
            )
        return done[key]

    return run


def check(
    folder: Path, flags: str, data_flags: list[str], reference_folder: Path, **options: Any
) -> None:
    """Run ours from the weights of stock Megatron's run, and compare all that was recorded."""
    assert max(differences(folder, flags, data_flags, reference_folder, **options)) < TOLERANCE


def differences(
    folder: Path,
    flags: str,
    data_flags: list[str],
    reference_folder: Path,
    *,
    num_ranks: int = 1,
    mutant: str = "nothing",
) -> list[float]:
    """How far ours are from stock Megatron's: the gradients of each step, and the parameters."""
    ours = train_and_record(
        folder,
        [*data_flags, *FLAGS.split(), *flags.split()],
        train_iters=STEPS,
        num_ranks=num_ranks,
        script=MUTANTS_SCRIPT,
        env={"INITIAL_PARAMETERS": str(reference_folder / "initial"), "MUTANT": mutant},
    )
    reference = read_record(reference_folder, STEPS)
    pairs = zip(
        [*ours.gradients, ours.parameters],
        [*reference.gradients, reference.parameters],
        strict=True,
    )
    return [relative_difference(mine, stocks) for mine, stocks in pairs]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("model", "average"),
    [
        *((model, "turn") for model in MODELS if model != "router"),
        *(("all", average) for average in ("token", "session")),
    ],
)
def test_gradients_are_those_of_stock_megatron(
    model: str, average: str, data_flags: list[str], stock: Callable[..., Path], tmp_path: Path
) -> None:
    flags = f"{MODELS[model]} --micro-batch-size {8 if model == 'global_aux_loss' else 1}"
    reference = stock(flags, "token" if average == "token" else "turn")
    check(tmp_path, f"{flags} --loss-average {average}", data_flags, reference)


LAYOUTS = {
    "DP2": (2, ""),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "TP2, SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "CP2": (2, "--context-parallel-size 2"),
    "TP2, SP, PP2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
    ),
}
VIRTUAL_STAGES = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(("router", layout) for layout in LAYOUTS),
        *(("MTP", layout) for layout in LAYOUTS if layout not in ("CP2", "EP2")),
    ],
)
def test_layouts_change_nothing(
    model: str, layout: str, data_flags: list[str], stock: Callable[..., Path], tmp_path: Path
) -> None:
    num_ranks, layout_flags = LAYOUTS[layout]
    flags = f"{MODELS[model]} --micro-batch-size 1"
    check(tmp_path, f"{flags} {layout_flags}", data_flags, stock(flags), num_ranks=num_ranks)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("model", ["router", "MTP"])
def test_virtual_stages_change_nothing(
    model: str, data_flags: list[str], stock: Callable[..., Path], tmp_path: Path
) -> None:
    flags = f"{MODELS[model]} --micro-batch-size 1 --num-layers 4"
    check(tmp_path, f"{flags} {VIRTUAL_STAGES}", data_flags, stock(flags), num_ranks=2)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DP2", "EP2"])
def test_the_global_auxiliary_loss_over_data_parallel_ranks(
    layout: str, data_flags: list[str], stock: Callable[..., Path], tmp_path: Path
) -> None:
    """Megatron itself gives it another size on another number of ranks."""
    num_ranks, layout_flags = LAYOUTS[layout]
    flags = f"{MODELS['global_aux_loss']} --micro-batch-size 4"
    reference = stock(flags, num_ranks=num_ranks)
    check(tmp_path, f"{flags} {layout_flags}", data_flags, reference, num_ranks=num_ranks)


@pytest.mark.distributed
@pytest.mark.parametrize("model", ["router", "MTP"])
def test_the_scale_of_fp16_losses_is_in_them(
    model: str, data_flags: list[str], stock: Callable[..., Path], tmp_path: Path
) -> None:
    """Without it the auxiliary gradients would be 1,024 times too small.

    In fp16 a rounding sends some tokens to other experts: 4% after a step.
    """
    flags = f"{MODELS[model]} --micro-batch-size 1 --fp16 --initial-loss-scale 1024"
    assert max(differences(tmp_path, flags, data_flags, stock(flags))) < 0.1


# Longer rows, which hold many sessions each: MTP and the main loss know nothing of rows.
PACKED = "--seq-length 256 --max-position-embeddings 256 --global-batch-size 2"


@pytest.mark.distributed
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_packing_changes_nothing_in_mtp(
    micro_batch: int, data_flags: list[str], stock: Callable[..., Path], tmp_path: Path
) -> None:
    reference = stock(f"{MODELS['MTP']} --micro-batch-size 1")
    flags = f"{MODELS['MTP']} {PACKED} --micro-batch-size {micro_batch}"
    check(tmp_path, flags, data_flags, reference)


MUTANTS = [
    ("seq_aux_loss", "auxiliary_losses_as_for_tokens"),
    ("z-loss", "auxiliary_losses_as_for_tokens"),
    ("seq_aux_loss", "auxiliary_losses_by_the_micro_batch"),
    ("MTP", "mtp_with_a_mask"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("model", "mutant"), MUTANTS)
def test_mutant_is_seen(
    model: str, mutant: str, data_flags: list[str], stock: Callable[..., Path], tmp_path: Path
) -> None:
    flags = f"{MODELS[model]} --micro-batch-size 1"
    found = differences(tmp_path, flags, data_flags, stock(flags), mutant=mutant)
    assert min(found) > 100 * TOLERANCE
