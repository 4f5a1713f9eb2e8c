"""The scripts for torchrun and the quickstart: what they would run."""

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_scripts import (
    SETTINGS,
    add_commands,
    dry_run,
    parsed,
    run_script,
    values_of,
    words_of,
)

from megatron_multiturn import __version__

SCRIPTS = ("launch/**/*.sh", "launch/*.slurm", "tests/run.sh", ".ci/run")


STAGED_DATA = ("DIALOGUE_DATA", "KNOWLEDGE_DATA", "INSTRUCTION_DATA")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck(repository: Path) -> None:
    scripts = [str(path) for pattern in SCRIPTS for path in sorted(repository.glob(pattern))]
    assert len(scripts) >= 16
    done = subprocess.run(
        ["shellcheck", "--external-sources", *scripts],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_torchrun_on_one_node(repository: Path) -> None:
    words = dry_run(
        repository,
        *("--lr", "1e-5"),
        NPROC_PER_NODE="8",
        TENSOR_PARALLEL="4",
        CONTEXT_PARALLEL="2",
    )
    assert values_of(words, "--nproc-per-node") == ["8"]
    assert values_of(words, "--standalone") == ["-m", "megatron_multiturn"]
    assert values_of(words, "--tensor-model-parallel-size") == ["4"]
    assert values_of(words, "--context-parallel-size") == ["2"]
    assert "--sequence-parallel" in words
    assert values_of(words, "--data-path") == ["0.3", "a", "0.7", "b"]
    assert values_of(words, "--tokenizer-model") == ["my tokenizer"]
    assert values_of(words, "--load") == values_of(words, "--save") == ["saved"]
    assert values_of(words, "--lr") == ["1e-5"], "flags behind the script win"


def test_torchrun_trains_for_iterations_or_epochs(repository: Path) -> None:
    assert values_of(dry_run(repository, TRAIN_ITERS="50"), "--train-iters") == ["50"]
    words = dry_run(repository, TRAIN_EPOCHS="1.5")
    assert values_of(words, "--train-epochs") == ["1.5"]
    assert "--train-iters" not in words


def test_torchrun_on_many_nodes(repository: Path) -> None:
    words = dry_run(repository, NNODES="4", NODE_RANK="3", MASTER_ADDR="n1", MASTER_PORT="2345")
    for flag, value in (
        ("--nnodes", "4"),
        ("--node-rank", "3"),
        ("--master-addr", "n1"),
    ):
        assert values_of(words, flag) == [value]
    assert values_of(words, "--master-port") == ["2345", "-m", "megatron_multiturn"]
    assert "--standalone" not in words
    assert "--sequence-parallel" not in words, "it is for tensor parallel ranks"


def test_torchrun_on_nodes_that_find_their_ranks(repository: Path) -> None:
    words = dry_run(repository, NNODES="4", MASTER_ADDR="n1", MASTER_PORT="2345", RDZV_ID="mine")
    for flag, values in (
        ("--nnodes", ["4"]),
        ("--rdzv-backend", ["c10d"]),
        ("--rdzv-endpoint", ["n1:2345"]),
        ("--rdzv-id", ["mine", "-m", "megatron_multiturn"]),
    ):
        assert values_of(words, flag) == values
    assert "--node-rank" not in words


def test_torchrun_begins_with_other_weights_only_where_it_has_none(
    repository: Path, tmp_path: Path
) -> None:
    words = dry_run(repository, PRETRAINED="base")
    assert values_of(words, "--pretrained-checkpoint") == ["base"]
    assert "--finetune" not in words, "which would begin anew each time that a run goes on"
    script = repository / "launch/pretrain_torchrun.sh"
    settings = {**SETTINGS, "SAVE_DIR": str(tmp_path / "saved")}
    done = run_script(script, PRETRAINED=str(tmp_path / "none"), **settings)
    assert done.returncode == 1
    assert f"PRETRAINED={tmp_path}/none: no such folder; name a checkpoint" in done.stderr


def test_torchrun_names_a_tokenizer_that_is_missing(repository: Path, tmp_path: Path) -> None:
    script = repository / "launch/pretrain_torchrun.sh"
    settings = {**SETTINGS, "TOKENIZER_MODEL": "my.model"}
    done = run_script(script, cwd=tmp_path, **settings)
    assert done.returncode == 1
    assert "TOKENIZER_MODEL=my.model: no such file on " in done.stderr
    assert f"as seen from {tmp_path}" in done.stderr


def test_torchrun_with_a_checkout(repository: Path) -> None:
    words = dry_run(repository, MEGATRON_PATH="/opt/Megatron-LM")
    module = words.index("megatron_multiturn")
    assert words[module + 1] == "/opt/Megatron-LM/pretrain_gpt.py"


def test_torchrun_names_the_variable_that_is_missing(repository: Path) -> None:
    script = repository / "launch/pretrain_torchrun.sh"
    for missing in SETTINGS:
        rest = {name: value for name, value in SETTINGS.items() if name != missing}
        done = run_script(script, DRY_RUN="1", **rest)
        assert done.returncode != 0
        assert f"{missing}: set it to" in done.stderr
    done = run_script(script, DRY_RUN="1", NNODES="2", NODE_RANK="0", **SETTINGS)
    assert "MASTER_ADDR: set it to" in done.stderr


def test_torchrun_uses_flags_that_exist(repository: Path, tmp_path: Path) -> None:
    path = add_commands(tmp_path / "bin", **{"nvidia-smi": "echo GPU 0; echo GPU 1"})
    words = dry_run(repository, PATH=path, EXIT_MINUTES="30", EXIT_SIGNAL="USR1", PRETRAINED="p")
    assert values_of(words, "--nproc-per-node") == ["2"]
    args = parsed(words)
    assert args.bf16
    assert args.exit_duration_in_mins == 30
    assert args.exit_signal_handler
    assert args.exit_signal == signal.SIGUSR1
    assert args.pretrained_checkpoint == "p"


# Stands for the interpreter: does what it is asked but for training, of which it keeps the words.
PYTHON = f"""
if [[ $2 == torch.distributed.run ]]; then
    printf '%s\\n' "$@" >>"$SAVE_DIR/words"
    trap -p USR1 >>"$SAVE_DIR/words"
    exit 0
fi
exec {sys.executable} "$@"
"""


def test_every_launch_is_noted(repository: Path, tmp_path: Path) -> None:
    add_commands(tmp_path / "bin", python=PYTHON)
    (tmp_path / "Megatron/megatron/core").mkdir(parents=True)
    (tmp_path / "Megatron/megatron/core/package_info.py").write_text("__version__ = '0.17.9'\n")
    settings = {
        **SETTINGS,
        "SAVE_DIR": str(tmp_path / "saved"),
        "MULTITURN_PYTHON": str(tmp_path / "bin/python"),
        "MEGATRON_PATH": str(tmp_path / "Megatron"),
        "NCCL_DEBUG": "INFO and more",
        "WANDB_API_KEY": "secret",
    }
    script = repository / "launch/pretrain_torchrun.sh"
    for seed in ("1", "2"):
        done = run_script(script, "--seed", seed, cwd=tmp_path, **settings)
        assert done.returncode == 0, done.stderr
    notes = sorted((tmp_path / "saved/launches").iterdir(), key=lambda path: path.stat().st_mtime)
    texts = [path.read_text() for path in notes]
    assert len(texts) == 2, "one a launch, and none is lost"
    for seed, text in zip(("1", "2"), texts, strict=True):
        printed = run_script(script, "--seed", seed, DRY_RUN="1", cwd=tmp_path, **settings).stdout
        assert text.endswith(printed)
        for line in (
            f"# megatron-multiturn {__version__}",
            f"# torch {importlib.metadata.version('torch')}",
            f"# megatron-core {importlib.metadata.version('megatron-core')}",
            "# Megatron of MEGATRON_PATH 0.17.9",
            f"cd {tmp_path}",
            "export NCCL_DEBUG=INFO\\ and\\ more",
        ):
            assert line in text.splitlines()
        assert re.search(rf"^# git revision of {re.escape(str(repository))} \w+", text, re.M)
        assert "secret" not in text
    # A note is a script that does the same again.
    words = (tmp_path / "saved/words").read_text()
    again = {name: settings[name] for name in ("SAVE_DIR", "WANDB_API_KEY")}
    notes[1].chmod(0o755)
    subprocess.run(["bash", str(notes[1])], env={**os.environ, **again}, check=True)
    assert (tmp_path / "saved/words").read_text() == words + words[len(words) // 2 :]


def test_a_python_without_torch_is_named(repository: Path, tmp_path: Path) -> None:
    add_commands(tmp_path / "bin", python="exit 1")
    python = str(tmp_path / "bin/python")
    for script, variables in (
        ("pretrain_torchrun.sh", SETTINGS),
        ("staged/run.sh", dict.fromkeys((*STAGED_DATA, "TOKENIZER_MODEL", "WORK_DIR"), "x")),
    ):
        done = run_script(
            repository / "launch" / script, cwd=tmp_path, MULTITURN_PYTHON=python, **variables
        )
        assert done.returncode == 1
        assert f"{python} has no PyTorch. Name one that has in MULTITURN_PYTHON" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_copy_works_anywhere(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(repository / "launch/pretrain_torchrun.sh", tmp_path / "mine.sh"))
    done = run_script(copy, DRY_RUN="1", cwd=tmp_path, **SETTINGS)
    assert done.returncode == 1
    assert "set MULTITURN_ROOT to one" in done.stderr
    done = run_script(
        copy, DRY_RUN="1", cwd=tmp_path, MULTITURN_ROOT=str(repository), MODEL="tiny", **SETTINGS
    )
    assert values_of(words_of(done.stdout), "--hidden-size") == ["64"]


def test_environment_explains_a_missing_python(repository: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "tr", "dirname"):
        (tools / name).symlink_to(str(shutil.which(name)))
    script = tmp_path / "setup.sh"
    script.write_text(
        f'#!/bin/bash\nsource "{repository}/launch/environment.sh"\n'
        f'ensure_environment "{tmp_path}" base\n'
    )
    script.chmod(0o755)
    done = run_script(script, PATH=str(tools), PYENV_ROOT=str(tmp_path), HOME=str(tmp_path))
    assert done.returncode == 1
    assert "No Python 3.12 or later" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_quickstart_refuses_what_it_would_spoil(repository: Path, tmp_path: Path) -> None:
    script = repository / "launch/quickstart.sh"
    (tmp_path / "thesis.txt").write_text("mine")
    done = run_script(script, QUICKSTART_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "holds other files" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    done = run_script(script, "no-such.jsonl", QUICKSTART_DIR=str(tmp_path / "new"))
    assert done.returncode == 1
    assert "no-such.jsonl: no such file" in done.stderr


def test_quickstart_explains_itself(repository: Path) -> None:
    done = run_script(repository / "launch/quickstart.sh", "--help")
    assert done.returncode == 0
    for line in ("my_sessions.jsonl", "TRAIN_ITERS", "LOSS_AVERAGE=turn"):
        assert line in done.stdout
    assert "set -e" not in done.stdout
