"""The selfcheck passes what is right, fails what is wrong, and never hangs."""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from megatron_jobs import _process_context, _wait, make_dataset, train_sentencepiece

from megatron_multiturn import selfcheck_flags, selfcheck_ranks, selfcheck_report
from megatron_multiturn.errors import ConfigError
from megatron_multiturn.selfcheck import default_folder, explain, main, parse
from megatron_multiturn.selfcheck_ranks import (
    CouldNotRunError,
    Failure,
    Rank,
    read_json,
    write_json,
)
from megatron_multiturn.selfcheck_report import passed, render

MUTANTS = Path(__file__).parent / "scripts" / "selfcheck_mutant.py"
ROOT = Path(__file__).resolve().parent.parent

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
    "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2 "
    "--init-method-std 0.1 --make-vocab-size-divisible-by 16 --attention-dropout 0 "
    "--seq-length 128 --max-position-embeddings 128 --micro-batch-size 1 --global-batch-size 64"
).split()
# What a training job has beside, and the selfcheck must not mind; and a dropout, and bf16.
TRAINING = (
    "--bf16 --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2000 --train-iters 100000 "
    "--hidden-dropout 0.1 --save-interval 10 --eval-iters 5 --eval-interval 10 --split 90,10,0 "
    "--clip-grad 1 --weight-decay 0.1 --log-turn-index 2 --num-workers 2"
).split()
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.01 --moe-token-dispatcher-type alltoall"
)
TP2, PP2, CP2, EP2 = (
    f"--{kind}-parallel-size 2"
    for kind in ("tensor-model", "pipeline-model", "context", "expert-model")
)


@pytest.fixture(scope="module")
def job_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a training job; its sessions have turns of 1 word and of 30, 1 to 12 turns."""
    folder = tmp_path_factory.mktemp("data")
    words = "red green blue one two three four five cat dog bird fish".split()
    sessions: list[dict[str, object]] = []
    for index in range(60):
        messages = []
        num_turns, num_words = ((12, 1), (1, 30), (2, 5), (3, 3))[index % 4]
        for turn in range(num_turns):
            answer = " ".join(words[(index + 5 * turn + k) % 12] for k in range(num_words))
            messages += [
                {"role": "user", "content": words[(index + turn) % 12]},
                {"role": "assistant", "content": answer},
            ]
        sessions.append({"messages": messages})
    tokenizer = train_sentencepiece(folder, words, vocab_size=60)
    data = make_dataset(folder, sessions, tokenizer)
    writes = ["--save", str(folder / "saved"), "--tensorboard-dir", str(folder / "board")]
    return [*MODEL, *TRAINING, *writes, *data, "--data-cache-path", str(folder / "cache")]


def check(
    folder: Path, num_ranks: int, flags: Sequence[str], env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Both jobs of a selfcheck as the command runs them, from a server; the report."""
    write_json(folder / "check.json", {"num_batches": 2, "micro_batches": 4, "dtype": "float32"})
    run_job("layout", folder, num_ranks, flags, env or {})
    run_job("reference", folder, 1, flags, env or {})
    report: dict[str, Any] = read_json(folder / "report.json")
    print(render(report))
    return report


def run_job(
    role: str, folder: Path, num_ranks: int, flags: Sequence[str], env: Mapping[str, str]
) -> None:
    arguments = [role, str(folder), *flags]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**env, "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        _process_context().Process(
            target=run_rank,
            args=(arguments, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
        )
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    if _wait(ranks, 300) is not None:
        failures = [path.read_text() for path in sorted(folder.glob("failure-*.json"))]
        logs = [path.read_text()[-3000:] for path in sorted(folder.glob(f"{role}-*.log"))]
        raise AssertionError("\n".join([*failures, *logs]))


def run_rank(arguments: list[str], env: dict[str, str]) -> None:
    role, folder = arguments[:2]
    with (Path(folder) / f"{role}-{env['RANK']}.log").open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(env)
    from megatron_multiturn.selfcheck_job import main as run_role

    run_role(arguments)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
        (2, f"{TP2} --sequence-parallel --loss-average session"),
        (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
        (2, f"{CP2} --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1"),
        (2, f"{EP2} {MOE}"),
        (1, "--mtp-num-layers 1 --micro-batch-size 2"),
    ],
)  # fmt: skip
def test_a_right_layout_passes(
    num_ranks: int, layout: str, job_flags: list[str], tmp_path: Path
) -> None:
    report = check(tmp_path, num_ranks, [*job_flags, *layout.split()])
    assert passed(report)
    # Far within the tolerance, so that this is no accident.
    for lines in selfcheck_report.compared_lines(report):
        assert {line.name for line in lines} >= {"lm loss", "token loss", "grad norm", "gradients"}
        assert all(line.difference < 2e-6 for line in lines)
    assert len(report["batches"]) == 2
    for batch in report["batches"]:
        assert batch["quantities"]["lm loss"] != batch["quantities"]["token loss"]
        assert batch["gradients"]["num_parameters"] >= 27
    assert report["batches"][0]["quantities"] != report["batches"][1]["quantities"]
    assert not (Path(job_flags[job_flags.index("--save") + 1])).exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mutant", "num_ranks", "layout", "failing"),
    [
        ("token-mean", 1, "", {"lm loss", "grad norm", "gradients"}),
        ("mean-of-means", 1, "", {"lm loss", "gradients"}),
        ("divisor-on-all-cp", 2, CP2, {"lm loss", "grad norm", "gradients"}),
        ("leak", 1, "", {"lm loss", "token loss", "gradients"}),
        ("shifted-mask", 1, "", {"lm loss", "token loss", "gradients"}),
        ("auxiliary-unscaled", 1, MOE, {"gradients"}),
    ],
)
def test_a_mutant_fails(
    mutant: str,
    num_ranks: int,
    layout: str,
    failing: set[str],
    job_flags: list[str],
    tmp_path: Path,
) -> None:
    flags = [str(MUTANTS), *job_flags, *layout.split()]
    report = check(tmp_path, num_ranks, flags, {"MUTANT": mutant})
    assert not passed(report)
    for lines in selfcheck_report.compared_lines(report):
        assert {line.name for line in lines if not line.passed} >= failing
        assert next(line for line in lines if line.name == "gradients").difference > 2e-2
    assert "FAIL: the layout does not compute what one rank does" in render(report)


def command_env(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **extra}


def run_command(
    folder: Path, flags: Sequence[str], *, torchrun: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    """The command in `folder`, by itself or under torchrun with so many ranks."""
    command = [sys.executable, "-m"]
    if torchrun:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
        command += ["-m"]
    return subprocess.run(
        [*command, "megatron_multiturn.selfcheck", *flags],
        cwd=folder,
        env=command_env(**env),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.distributed
def test_under_torchrun(job_flags: list[str], tmp_path: Path) -> None:
    flags = [*job_flags, *TP2.split(), "--check-batches", "1", "--check-micro-batches", "2"]
    process = run_command(tmp_path, flags, torchrun=2)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert re.fullmatch(r"megatron-multiturn-selfcheck: logs in selfcheck-\S+", lines[0])
    assert "layout     2 ranks: DP 1 x TP 2, micro-batches of 1; CPU" in lines
    assert "note       in float32; the job's own is bfloat16 (--check-dtype given)" in lines
    assert "note       without dropout" in lines
    assert "note       2 of 64 micro-batches a global batch (--check-micro-batches)" in lines
    assert re.search(r"(?m)^batch 1: 2 rows, [\d,]+ turns, [\d,]+ target tokens$", process.stdout)
    assert re.search(r"(?m)^  lm loss +\d\.\d+ +\d\.\d+ +\d\.\de-\d\d$", process.stdout)
    assert lines[-1] == (
        "PASS: the layout computes what one rank does (losses within 1e-5, gradient norm within "
        "1e-4, each gradient within 1e-4)"
    )
    assert len(lines) < 25, "Megatron's own chatter goes to the log"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_exit_code_and_message_of_a_bad_flag(job_flags: list[str], tmp_path: Path) -> None:
    process = run_command(tmp_path, [*job_flags, "--no-such-flag"])
    assert process.returncode == 2
    assert process.stderr == (
        "megatron-multiturn-selfcheck: could not run: unrecognized arguments: --no-such-flag\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_a_rank_that_dies_ends_everything(job_flags: list[str], tmp_path: Path) -> None:
    """Started by hand, as other launchers do: nobody but the ranks themselves ends them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = command_env(MUTANT="dies", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    command = [sys.executable, "-m", "megatron_multiturn.selfcheck", str(MUTANTS), *job_flags]
    command += [*PP2.split(), "--check-folder", "shared/check"]
    start = time.monotonic()
    ranks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in ranks]
    assert time.monotonic() - start < 120
    assert [process.returncode for process in ranks] == [2, 2]
    assert (
        "could not run: rank 1 of the job failed: the process ended by signal SIGKILL"
        in (outputs[0])
    )
    assert outputs[1] == ""
    left = sorted(path.name for path in (tmp_path / "shared" / "check").glob("*.log"))
    assert left == ["layout-0.log", "layout-1.log"]
    assert not (tmp_path / "shared" / "check" / "initial").exists()
    assert processes_in(tmp_path) == set()


@pytest.mark.distributed
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_the_command(
    how: signal.Signals, job_flags: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "megatron_multiturn.selfcheck", *job_flags]
    process = subprocess.Popen(command, cwd=tmp_path, env=command_env(), stdout=subprocess.DEVNULL)
    assert eventually(lambda: len(processes_in(tmp_path)) == 2)
    process.send_signal(how)
    process.wait(timeout=60)
    assert eventually(lambda: not processes_in(tmp_path))


def processes_in(folder: Path) -> set[int]:
    """The processes whose working directory it is."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cwd").readlink() == folder:
                found.add(int(path.name))
    return found


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it comes true within that time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def failure_of(folder: Path, flags: Sequence[str], **env: str) -> Failure:
    """How the layout's job fails on one rank."""
    write_json(folder / "check.json", {"num_batches": 1, "micro_batches": 1, "dtype": "float32"})
    with pytest.raises(AssertionError):
        run_job("layout", folder, 1, flags, env)
    found = read_json(folder / "failure-0.json")
    log = folder / f"{found['role']}-{found['rank']}.log"
    return Failure(rank=found["rank"], kind=found["kind"], message=found["message"], log=log)


@pytest.mark.distributed
def test_what_the_job_is_refused_for_is_refused(job_flags: list[str], tmp_path: Path) -> None:
    """Also where the check would have changed the flag: it trains without dropout."""
    failure = failure_of(tmp_path, [*job_flags, "--attention-dropout", "0.1"])
    assert failure.kind == "user"
    assert re.search(r"--attention-dropout above 0: .*pass --attention-dropout 0", explain(failure))


@pytest.mark.distributed
def test_the_scripts_own_objective_is_not_checked(job_flags: list[str], tmp_path: Path) -> None:
    flags = [str(MUTANTS), *job_flags, "--dataset-provider", "megatron"]
    failure = failure_of(tmp_path, flags, MUTANT="none")
    assert explain(failure).startswith("--dataset-provider megatron trains the script's own")


@pytest.mark.distributed
def test_too_large_a_model_has_a_remedy(job_flags: list[str], tmp_path: Path) -> None:
    failure = failure_of(tmp_path, [str(MUTANTS), *job_flags], MUTANT="out-of-memory")
    assert re.match(
        r"rank 0 of the job is out of GPU memory: .*--num-layers 2 .*later flags win.*"
        r"--check-dtype given",
        explain(failure),
    )


def parsed_flags(**changes: object) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """A namespace with some of Megatron's flags, and a parser that knows their defaults."""
    defaults: dict[str, object] = {
        "fp16": False, "bf16": False, "fp8": None, "loss_scale": None,
        "initial_loss_scale": 2.0**32, "min_loss_scale": 1.0,
        "hidden_dropout": 0.1, "attention_dropout": 0.1, "num_experts": None,
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": None, "save": None,
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1, "expert_model_parallel_size": 1, "sequence_parallel": False,
        "make_vocab_size_divisible_by": 128, "recompute_granularity": None, "load": None,
        "use_distributed_optimizer": False, "overlap_p2p_comm": True, "micro_batch_size": None,
        "global_batch_size": None, "rampup_batch_size": None, "rotary_base": 10000,
        "packed_attention": "auto",
    }  # fmt: skip
    parser = argparse.ArgumentParser()
    for name, default in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), default=default)
    return argparse.Namespace(**{**defaults, "world_size": 1, **changes}), parser


def test_both_runs_are_in_float32_unless_it_is_declined() -> None:
    args, parser = parsed_flags(bf16=True, fp8="e4m3", save="there", rampup_batch_size=[1, 1, 9])
    notices = selfcheck_flags.prepare_both(args, parser, num_batches=3, dtype="float32")
    assert (args.bf16, args.fp8, args.save, args.rampup_batch_size) == (False, None, None, None)
    assert (args.train_iters, args.eval_iters, args.hidden_dropout) == (3, 0, 0.0)
    assert notices == [
        "in float32; the job's own is bfloat16 (--check-dtype given)",
        "without dropout",
    ]
    args, parser = parsed_flags(fp16=True, hidden_dropout=0.0)
    assert selfcheck_flags.prepare_both(args, parser, num_batches=1, dtype="given") == []
    assert args.fp16
    assert args.initial_loss_scale == 1.0


def test_transformer_engines_ring_is_checked_in_its_own_precision() -> None:
    ring = {"packed_attention": "te", "context_parallel_size": 2, "bf16": True}
    args, parser = parsed_flags(**ring)
    with pytest.raises(ConfigError, match=r"does not run in float32; .* --check-dtype given"):
        selfcheck_flags.prepare_both(args, parser, num_batches=1, dtype="float32")
    selfcheck_flags.prepare_both(args, parser, num_batches=1, dtype="given")
    assert args.packed_attention == "te"
    args, parser = parsed_flags(**ring | {"context_parallel_size": 1})
    selfcheck_flags.prepare_both(args, parser, num_batches=1, dtype="float32")
    assert args.packed_attention == "auto"


def test_the_reference_is_cut_over_nothing() -> None:
    args, parser = parsed_flags(
        bf16=True, tensor_model_parallel_size=4, pipeline_model_parallel_size=2,
        expert_model_parallel_size=2, sequence_parallel=True, recompute_granularity="full",
        use_distributed_optimizer=True, overlap_p2p_comm=False, load="there", rotary_base=500000,
        make_vocab_size_divisible_by=8,
    )  # fmt: skip
    selfcheck_flags.prepare_one_rank(args, parser, global_batch_size=24)
    assert args.make_vocab_size_divisible_by == 32
    for name in ("tensor_model", "pipeline_model", "expert_model", "context"):
        assert getattr(args, f"{name}_parallel_size") == 1
    assert not args.sequence_parallel
    assert not args.use_distributed_optimizer
    assert not args.bf16
    assert args.overlap_p2p_comm
    assert args.recompute_granularity is None
    assert args.load is None
    assert args.global_batch_size == 24
    assert args.rotary_base == 500000


@pytest.mark.parametrize(
    ("sizes", "at_most", "number", "batch_size"),
    [
        ({"world_size": 2}, 4, 4, 16),  # DP 2, micro-batches of 2
        ({"world_size": 2}, 0, 16, 64),
        ({"world_size": 2, "global_batch_size": 8}, 4, 2, 8),
        ({"world_size": 2, "global_batch_size": None}, 4, 1, None),
        ({"world_size": 3, "pipeline_model_parallel_size": 3}, 4, 6, 12),
        ({"world_size": 8, "tensor_model_parallel_size": 2, "context_parallel_size": 2}, 1, 1, 4),
    ],
)
def test_global_batches_are_cut_to_some_micro_batches(
    sizes: dict[str, Any], at_most: int, number: int, batch_size: int | None
) -> None:
    args, _ = parsed_flags(**{"micro_batch_size": 2, "global_batch_size": 64, **sizes})
    assert selfcheck_flags.limit_global_batch(args, at_most) == number
    assert args.global_batch_size == batch_size


@pytest.mark.parametrize(
    ("kinds", "coefficients", "kept"),
    [
        ("aux_loss", 0.1, None),
        ("global_aux_loss", 0.1, (["none"], [0.0])),
        (["seq_aux_loss", "global_aux_loss"], [0.1, 0.2], (["seq_aux_loss"], [0.1])),
    ],
)
def test_layout_dependent_losses_are_left_out(kinds: Any, coefficients: Any, kept: Any) -> None:
    args, parser = parsed_flags(
        num_experts=8, moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=coefficients
    )
    notices = selfcheck_flags.prepare_both(args, parser, num_batches=1, dtype="float32")
    assert any("global_aux_loss" in notice for notice in notices) == (kept is not None)
    if kept:
        assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == kept


def test_own_flags_are_taken_out_of_the_others() -> None:
    options, others = parse(
        ["train.py", "--num-layers", "2", "--check-batches", "5", "--check-for-nan", "--check-keep"]
    )
    assert (options.check_batches, options.check_keep, options.check_dtype) == (5, True, "float32")
    assert others == ["train.py", "--num-layers", "2", "--check-for-nan"]
    for bad in (["--check-batches", "0"], ["--check-micro-batches", "-1"], ["--check-dtype", "x"]):
        with pytest.raises(SystemExit, match="2"):
            parse(bad)


def test_ranks_of_a_job_agree_on_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert default_folder() == "selfcheck-29500"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    assert default_folder() == "selfcheck-job-7"


def report_of(**batch: Any) -> dict[str, Any]:
    """A report of one batch in which everything is equal, but for `batch`."""
    sizes = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor", "data")
    layout: dict[str, Any] = {f"{name}_parallel_size": 1 for name in sizes} | {
        "world_size": 1, "virtual_stages": 1, "sequence_parallel": False, "num_experts": None,
        "distributed_optimizer": False, "micro_batch_size": 1, "dtype": "float32",
        "device": "CPU", "notices": [],
    }  # fmt: skip
    equal: dict[str, Any] = {
        "num_rows": 4, "num_turns": 9.0, "num_targets": 70.0,
        "quantities": {"lm loss": [5.0, 5.0], "turns": [9.0, 9.0], "grad norm": [2.0, 2.0]},
        "gradients": {
            "num_parameters": 3, "worst": [["w", 1e-7], ["v", 1e-8]], "norms": [2.0, 2.0],
            "replicas": [0.0, ""],
        },
    }  # fmt: skip
    for name, value in batch.items():
        equal[name] = {**equal[name], **value}
    return {"layout": layout, "dtype": "float32", "weights": [0.0, ""], "batches": [equal]}


@pytest.mark.parametrize(
    ("change", "code", "verdict"),
    [({}, 0, "PASS"), ({"quantities": {"lm loss": [6.0, 5.0]}}, 1, "FAIL")],
)
def test_exit_code(
    change: dict[str, Any],
    code: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def run(rank: Rank, role: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        assert arguments == ["--num-layers", "2"]
        assert env["WORLD_SIZE"] == "1"
        assert env["NVIDIA_TF32_OVERRIDE"] == "0"
        write_json(rank.folder / "report.json", report_of(**change))

    monkeypatch.setattr(Rank, "run", run)
    folder = tmp_path / "check"
    arguments = ["--num-layers", "2", "--check-folder", str(folder)]
    assert main(arguments) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(verdict)
    assert not folder.exists()
    main([*arguments, "--check-keep"])
    assert (folder / "report.json").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantities": {"lm loss": [5.0002, 5.0]}}, "lm loss"),
        ({"quantities": {"lm loss": [float("nan"), 5.0]}}, "lm loss"),
        ({"quantities": {"turns": [10.0, 9.0]}}, "turns"),
        ({"quantities": {"grad norm": [2.001, 2.0]}}, "grad norm"),
        ({"gradients": {"worst": [["w", 2e-4]]}}, "gradients"),
        ({"gradients": {"worst": [["w", float("nan")]]}}, "gradients"),
        ({"gradients": {"replicas": [0.5, "w"]}}, "replicas"),
    ],
)
def test_the_verdict(change: dict[str, Any], named: str) -> None:
    good, bad = report_of(), report_of(**change)
    assert passed(good)
    assert render(good).splitlines()[-1].startswith("PASS: ")
    assert not passed(bad)
    assert re.search(rf"(?m)^FAIL: [^:]*: {named} \(", render(bad))
    assert re.search(rf"(?m)^  {named} .* more than 1e-", render(bad))
    assert "the gradients that differ most:" in render(bad)


def test_weights_that_differ_between_ranks_fail() -> None:
    report = {**report_of(), "weights": [1e-8, "decoder.w"]}
    assert not passed(report)
    assert "ranks that hold the same weights disagree: decoder.w" in render(report)


def test_experts_may_be_chosen_otherwise_within_rounding() -> None:
    report = report_of(gradients={"worst": [["w", 1e-3]]})
    assert not passed(report)
    report["layout"]["num_experts"] = 8
    assert passed(report)


def test_ranks_meet_in_a_folder_left_by_an_earlier_check(tmp_path: Path) -> None:
    import threading

    folder = tmp_path / "check"
    for number in (1, 2):  # the second time everything of the first still lies there
        ranks = [Rank(number=rank, world_size=3, folder=folder) for rank in range(3)]
        threads = [threading.Thread(target=r.meet, args=({"number": number},)) for r in ranks]
        for thread in reversed(threads):
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert read_json(folder / "check.json")["number"] == number
        write_json(folder / "failure-1.json", "of the first")


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, r"rank 1 \(2 in all\) does not come to .*--check-folder"),
     (1, r"rank 1 does not meet rank 0 in .*--check-folder")],
)  # fmt: skip
def test_a_folder_that_is_not_shared_is_an_error(
    rank: int, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selfcheck_ranks, "_MEETING_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=message):
        Rank(number=rank, world_size=3, folder=tmp_path / "check").meet({})


def test_a_rank_0_that_falls_silent_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selfcheck_ranks, "_SILENCE_SECONDS", 1.5)
    rank = Rank(number=1, world_size=2, folder=tmp_path)
    with pytest.raises(ConfigError, match="rank 0 has been silent"):
        rank.await_verdict()
    write_json(tmp_path / "verdict.json", 1)
    assert rank.await_verdict() == 1


def test_the_first_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that fails takes its peers with it, and these may be seen first."""
    monkeypatch.setattr(selfcheck_ranks, "_ROOT_CAUSE_SECONDS", 0.0)
    for rank, when in ((0, 30.0), (1, 10.0), (2, 20.0)):
        failure = {"role": "layout", "rank": rank, "time": when, "kind": "error", "message": "?"}
        write_json(tmp_path / f"failure-{rank}.json", failure)
    with pytest.raises(CouldNotRunError) as caught:
        Rank(number=0, world_size=3, folder=tmp_path).await_verdict()
    assert caught.value.failure.rank == 1
    assert caught.value.failure.log == tmp_path / "layout-1.log"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="it holds other things"):
        Rank(number=0, world_size=1, folder=tmp_path).meet({})
    assert (tmp_path / "thesis.tex").exists()


def test_messages_of_the_reference(tmp_path: Path) -> None:
    log = tmp_path / "reference-0.log"
    failure = Failure(rank=0, kind="memory", message="OutOfMemoryError: ...", log=log)
    assert re.match(
        r"the reference on one rank is out of GPU memory: .*--num-layers 2", explain(failure)
    )
    assert "--check-dtype" not in explain(failure)
    failure = Failure(rank=0, kind="error", message="KeyError: 'x'", log=log)
    assert explain(failure) == "the reference on one rank failed: KeyError: 'x'"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("selfcheck", ["torch", "megatron", "numpy"]),
        # Which Megatron it is the runner decides, and whether there is a GPU.
        ("selfcheck_job", ["megatron", "torch._dynamo"]),
    ],
)
def test_modules_import_nothing_early(module: str, unwanted: list[str]) -> None:
    code = (
        f"import sys, megatron_multiturn.{module}; "
        f"print([m for m in {unwanted!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=command_env(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
