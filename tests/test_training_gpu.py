"""Whole training runs on GPUs: against the CPU in float32, and on two GPUs in bfloat16.

In bfloat16 two right runs differ by rounding. How far they may is measured beside them: stock
Megatron, with its own rows, forward step and loss, trains the same model on one GPU and on two
(tensor and sequence parallel). Twice the difference of its two runs is allowed, or the floor below
where that is larger. On two H200, stock's runs differ by up to 2.0e-4 in the loss, 4.3e-3 in the
gradient norm and 1.2e-2 in the gradient; ours by up to 1.0e-3, 2.8e-3 and 1.7e-2.
"""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from gpu_jobs import ON_CPU, Job, RunningJobs, counts, deviations
from megatron_jobs import SCRIPT, JobResult

pytestmark = [pytest.mark.distributed, *([] if ON_CPU else [pytest.mark.gpu])]

HAS_TE = not ON_CPU and importlib.util.find_spec("transformer_engine") is not None
NUM_GPUS = 2 if ON_CPU else torch.cuda.device_count()
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
with_te = pytest.mark.skipif(not HAS_TE, reason="Transformer Engine is not installed")

# Below these a small spread of the two stock runs would be luck. `lm loss` is a mean over 58 turns,
# some of one token, and stock's is one over 4,096 tokens: rounding averages out less.
FLOORS = {"lm loss": 2e-3, "token loss": 1e-3, "grad norm": 1e-2, "gradient": 3e-2}
FLOAT32_TOLERANCE = 1e-4  # between CPU and GPU, over ten steps
FLOAT32_LAYOUT_TOLERANCE = 1e-5  # between one GPU and two, over three

MB4 = "--micro-batch-size 4"
TP2, PP2, CP2 = (
    f"--{kind}-parallel-size 2 {MB4}" for kind in ("tensor-model", "pipeline-model", "context")
)
TP2_SP = f"{TP2} --sequence-parallel"
# Later flags win. Transformer Engine's ranks share the pieces of one row.
RING = f"--packed-attention te {CP2} --micro-batch-size 1 --cp-comm-type"

# By Megatron's implementation of the layers: what one GPU runs, and what is compared with it.
BASE = {
    "local": "--bf16 --transformer-impl local --packed-attention torch",
    "te": "--bf16 --transformer-impl transformer_engine",
}
ONE = {"local": MB4, "te": f"--packed-attention te {MB4}"}
LAYOUTS = {
    "local": {
        "DP2": f"--use-distributed-optimizer {MB4}",
        "TP2": TP2,
        "TP2 SP": TP2_SP,
        "PP2": PP2,
        "CP2": CP2,
    },
    "te": {
        "TP2 SP": f"--packed-attention te {TP2_SP}",
        "CP2 p2p": f"{RING} p2p",
        "CP2 a2a": f"{RING} a2a",
        "CP2 auto": f"--packed-attention auto {CP2}",
        "CP2 torch": f"--packed-attention torch {CP2}",
    },
}
STOCK = {
    "local": "--spec whole_row_attention whole_row_layer_spec --no-gradient-accumulation-fusion "
    "--no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion",
    "te": "--no-gradient-accumulation-fusion",
}
# Mistakes that the comparison must see, by what they are made in.
MUTANTS = {
    "local": {
        "divisor_of_every_cp_rank": Job(flags=CP2, num_ranks=2),
        "leaking_attention": Job(flags=MB4),
    },
    "te": {
        "divisor_of_every_cp_rank": Job(flags=f"{RING} p2p", num_ranks=2),
        "leaking_attention": Job(flags=f"--packed-attention te {MB4}"),
    },
}
CHECKS = {
    "check TP2 SP": f"{BASE['local']} {TP2_SP}",
    "check CP2": f"{BASE['local']} {CP2}",
}
TE_CHECKS = {"check CP2 p2p": f"{BASE['te']} {RING} p2p --check-dtype given"}

IMPLEMENTATIONS = ["local", pytest.param("te", marks=with_te)]


def float32_jobs() -> dict[str, Job]:
    flags = f"--transformer-impl local {MB4}"
    full = {"NVIDIA_TF32_OVERRIDE": "0"}  # containers may round the factors of products
    return {
        "CPU": Job(flags=flags, num_steps=10, env={"CUDA_VISIBLE_DEVICES": ""}),
        "GPU": Job(flags=flags, num_steps=10, env=full),
        "float32 one": Job(flags=flags, env=full),
    }


def float32_layout_jobs() -> dict[str, Job]:
    full = {"NVIDIA_TF32_OVERRIDE": "0"}
    return {
        f"float32 {layout}": Job(flags=f"--transformer-impl local {flags}", num_ranks=2, env=full)
        for layout, flags in LAYOUTS["local"].items()
    }


def bfloat16_jobs(impl: str) -> dict[str, Job]:
    """What trains with one implementation of the layers, by `impl` and what is special."""
    base = BASE[impl]
    jobs = {"one": Job(flags=f"{base} {ONE[impl]}")}
    for layout, flags in LAYOUTS[impl].items():
        jobs[layout] = Job(flags=f"{base} {flags}", num_ranks=2)
    stock = f"{base} --dataset-provider megatron --no-create-attention-mask-in-dataloader"
    script = SCRIPT.with_name("stock_rows_and_record.py")
    for name, layout, num_ranks in (("stock", MB4, 1), ("stock TP2 SP", TP2_SP, 2)):
        flags = f"{stock} {layout} {STOCK[impl]}"
        jobs[name] = Job(flags=flags, num_ranks=num_ranks, script=script)
    for mutant, job in MUTANTS[impl].items():
        jobs[mutant] = Job(
            flags=f"{base} {job.flags}",
            num_ranks=job.num_ranks,
            script=SCRIPT.with_name("mutants.py"),
            env={"MUTANT": mutant},
        )
    if impl == "te":
        jobs["torch attention"] = Job(flags=f"{base} --packed-attention torch {MB4}")
        # The exchange of heads around Transformer Engine's kernel.
        flags, script = jobs["CP2 auto"].flags, SCRIPT.with_name("auto_takes_te.py")
        jobs["CP2 auto, TE's kernel"] = Job(flags=flags, num_ranks=2, script=script)
    return {f"{impl} {name}": job for name, job in jobs.items()}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningJobs]:
    """Every job that this machine can run, started."""
    jobs, checks = float32_jobs(), {}
    if NUM_GPUS >= 2:
        jobs |= (
            float32_layout_jobs() | bfloat16_jobs("local") | (bfloat16_jobs("te") if HAS_TE else {})
        )
        flags = CHECKS | (TE_CHECKS if HAS_TE else {})
        checks = {name: Job(flags=given, num_ranks=2) for name, given in flags.items()}
    with RunningJobs(tmp_path_factory.mktemp("jobs"), jobs, checks) as started:
        yield started


def bounds(running: RunningJobs, impl: str) -> dict[str, float]:
    """How far a run may be from that on one GPU, by the names of `deviations`."""
    two, one = running.result(f"{impl} stock TP2 SP"), running.result(f"{impl} stock")
    spread = deviations(two, one)
    print("stock:", spread)  # what is seen, for pytest -rP
    spread["token loss"] = spread["lm loss"]  # stock Megatron's loss is a mean over tokens
    return {name: max(floor, 2 * spread[name]) for name, floor in FLOORS.items()}


def assert_counts(result: JobResult) -> None:
    """The global batch holds all turns and all targets, neither more nor less, in every step."""
    for step in result.losses:
        # A turn is a sum of its tokens' shares, in float64.
        assert {name: round(step[name], 6) for name in counts()} == counts()


def assert_as_on_one(running: RunningJobs, impl: str, name: str) -> None:
    result, one = running.result(f"{impl} {name}"), running.result(f"{impl} one")
    assert_counts(result)
    assert_counts(one)
    found, allowed = deviations(result, one), bounds(running, impl)
    print("ours:", found)
    # So written, NaN is not within.
    assert all(found[quantity] <= allowed[quantity] for quantity in FLOORS), (found, allowed)


def test_float32_on_a_gpu_is_float32_on_the_cpu(running: RunningJobs) -> None:
    gpu, cpu = running.result("GPU"), running.result("CPU")
    assert "NO GPU" in running.log("CPU")
    assert ("NO GPU" in running.log("GPU")) == ON_CPU
    assert_counts(gpu)
    found = deviations(gpu, cpu)
    print(found)
    assert len(cpu.losses) == 10
    assert found["lm loss"] < FLOAT32_TOLERANCE
    assert found["token loss"] < FLOAT32_TOLERANCE
    # The curve moves far more in every step, so another step's loss would be seen.
    losses = torch.tensor([step["lm loss"] for step in cpu.losses])
    assert (losses.diff().abs() > 100 * FLOAT32_TOLERANCE * losses[1:]).all()


@two_gpus
@pytest.mark.parametrize("layout", LAYOUTS["local"])
def test_two_gpus_train_as_one_in_float32(layout: str, running: RunningJobs) -> None:
    result = running.result(f"float32 {layout}")
    assert_counts(result)
    found = deviations(result, running.result("float32 one"))
    print(found)
    assert all(value < FLOAT32_LAYOUT_TOLERANCE for value in found.values()), found


@two_gpus
@pytest.mark.parametrize("layout", LAYOUTS["local"])
def test_two_gpus_train_as_one(layout: str, running: RunningJobs) -> None:
    assert_as_on_one(running, "local", layout)


@two_gpus
@with_te
@pytest.mark.parametrize("layout", [*LAYOUTS["te"], "CP2 auto, TE's kernel"])
def test_two_gpus_train_as_one_with_transformer_engine(layout: str, running: RunningJobs) -> None:
    """With its ring, pieces are rounded up to 4 positions and rows are packed otherwise.

    A step is the whole data set in either case, so it is the mean over the same turns.
    """
    assert_as_on_one(running, "te", layout)


@two_gpus
@with_te
def test_torch_attention_between_transformer_engine_layers(running: RunningJobs) -> None:
    assert_as_on_one(running, "te", "torch attention")


@two_gpus
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_divisor_of_every_cp_rank_is_seen(impl: str, running: RunningJobs) -> None:
    """Gradients and loss are half of what they should be."""
    mutant, one = (running.result(f"{impl} {n}") for n in ("divisor_of_every_cp_rank", "one"))
    found, allowed = deviations(mutant, one), bounds(running, impl)
    for quantity in ("lm loss", "grad norm", "gradient"):
        assert found[quantity] > 10 * allowed[quantity]


@two_gpus
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_attention_across_pieces_is_seen(impl: str, running: RunningJobs) -> None:
    mutant, one = (running.result(f"{impl} {n}") for n in ("leaking_attention", "one"))
    found, allowed = deviations(mutant, one), bounds(running, impl)
    for quantity in FLOORS:
        assert found[quantity] > 10 * allowed[quantity]


@two_gpus
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("check TP2 SP", "2 ranks: DP 1 x TP 2 (sequence parallel)"),
        ("check CP2", "2 ranks: DP 1 x CP 2"),
        pytest.param("check CP2 p2p", "2 ranks: DP 1 x CP 2", marks=with_te),
    ],
)
def test_the_selfcheck_passes(name: str, layout: str, running: RunningJobs) -> None:
    lines = running.check_output(name).splitlines()
    print("\n".join(lines))
    (described,) = [line for line in lines if line.startswith("layout ")]
    assert layout in described
    assert described.endswith("; CPU") == ON_CPU
    assert any(line.startswith("PASS: ") for line in lines)
    num_turns = f"{counts()['turns']} turns"
    assert sum(line.startswith("batch ") and num_turns in line for line in lines) == 2
