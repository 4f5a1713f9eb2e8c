"""The shell scripts and the README: what they would run, and that what they name exists."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = ("launch/*.sh", "tests/run.sh", ".ci/run")
SETTINGS = {"DATA_PATH": "0.3 a 0.7 b", "TOKENIZER_MODEL": "my tokenizer", "SAVE_DIR": "saved"}


def run_script(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a clean environment, PATH apart, and `variables`."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.run(
        [str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


def words_of(command: str) -> list[str]:
    """The words of a shell command over several lines."""
    return shlex.split(command.replace("\\\n", ""))


def dry_run(repository: Path, *arguments: str, **variables: str) -> list[str]:
    """The words of the command that train_torchrun.sh would run."""
    script = repository / "launch/train_torchrun.sh"
    done = run_script(script, *arguments, DRY_RUN="1", **{**SETTINGS, **variables})
    assert done.returncode == 0, done.stderr
    return words_of(done.stdout)


def values_of(words: list[str], flag: str) -> list[str]:
    """The words between a flag's last occurrence and the next flag."""
    start = len(words) - words[::-1].index(flag)
    rest = words[start:]
    stop = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:stop]


def add_commands(folder: Path, **commands: str) -> str:
    """A PATH whose first folder holds these shell commands."""
    folder.mkdir(exist_ok=True)
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck(repository: Path) -> None:
    scripts = [str(path) for pattern in SCRIPTS for path in sorted(repository.glob(pattern))]
    assert len(scripts) >= 6
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


def test_torchrun_with_a_checkout(repository: Path) -> None:
    words = dry_run(repository, MEGATRON_PATH="/opt/Megatron-LM")
    module = words.index("megatron_multiturn")
    assert words[module + 1] == "/opt/Megatron-LM/pretrain_gpt.py"


def test_torchrun_names_the_variable_that_is_missing(repository: Path) -> None:
    script = repository / "launch/train_torchrun.sh"
    for missing in SETTINGS:
        rest = {name: value for name, value in SETTINGS.items() if name != missing}
        done = run_script(script, DRY_RUN="1", **rest)
        assert done.returncode != 0
        assert f"{missing}: set it to" in done.stderr
    done = run_script(script, DRY_RUN="1", NNODES="2", NODE_RANK="0", **SETTINGS)
    assert "MASTER_ADDR: set it to" in done.stderr


def test_torchrun_uses_flags_that_exist(repository: Path, tmp_path: Path) -> None:
    """Every flag of the command is one of Megatron's or ours."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_multiturn.arguments import add_multiturn_args

    path = add_commands(tmp_path / "bin", **{"nvidia-smi": "echo GPU 0; echo GPU 1"})
    words = dry_run(repository, PATH=path, EXIT_MINUTES="30")
    assert values_of(words, "--nproc-per-node") == ["2"]
    flags = words[words.index("megatron_multiturn") + 1 :]
    parser = add_multiturn_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    args, unknown = parser.parse_known_args(flags)
    assert unknown == []
    assert args.bf16
    assert args.exit_duration_in_mins == 30


SLURM_JOB = {
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_GPUS_ON_NODE": "8",
}
# Answers as SLURM's own commands do; requeue leaves a mark. srun "trains" to iteration 70.
SCONTROL = (
    'case "$1" in\n'
    '  show) [ "$3" = "node[7-8]" ] && printf "node7\\nnode8\\n" ;;\n'
    '  requeue) echo "$2" > "$SAVE_DIR/requeued" ;;\n'
    "esac"
)
SRUN = 'echo "${REACHED:-70}" > "$SAVE_DIR/latest_checkpointed_iteration.txt"'


def run_slurm(
    repository: Path, tmp_path: Path, *, ends: str = "N/A", srun: str = SRUN, **variables: str
) -> subprocess.CompletedProcess[str]:
    path = add_commands(tmp_path / "bin", scontrol=SCONTROL, srun=srun, squeue=f"echo '{ends}'")
    save = tmp_path / "saved"
    save.mkdir(exist_ok=True)
    settings = {**SETTINGS, **SLURM_JOB, "SLURM_SUBMIT_DIR": str(repository), "PATH": path}
    settings |= {"SAVE_DIR": str(save), **variables}
    return run_script(repository / "launch/train_slurm.sh", "--seed", "7", **settings)


def test_slurm_takes_everything_from_the_job(repository: Path, tmp_path: Path) -> None:
    done = run_slurm(repository, tmp_path, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    step, _, command = done.stdout.partition("\n")
    assert shlex.split(step)[-3:] == [str(repository / "launch/train_torchrun.sh"), "--seed", "7"]
    words = words_of(command)
    for flag, value in (
        ("--nnodes", "2"),
        ("--node-rank", "0"),
        ("--nproc-per-node", "8"),
        ("--master-addr", "node7"),
    ):
        assert values_of(words, flag) == [value]
    assert 1024 < int(values_of(words, "--master-port")[0]) < 65536
    assert values_of(words, "--seed") == ["7"]
    assert "--exit-duration-in-mins" not in words, "this job has no time limit"


def test_slurm_stops_before_the_time_limit(repository: Path, tmp_path: Path) -> None:
    end = subprocess.run(
        ["date", "--date", "now + 60 minutes", "+%Y-%m-%dT%H:%M:%S"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    done = run_slurm(repository, tmp_path, ends=end, DRY_RUN="1", STOP_MINUTES="15")
    (minutes,) = values_of(words_of(done.stdout), "--exit-duration-in-mins")
    assert 43 <= int(minutes) <= 45


def test_slurm_queues_an_unfinished_job_again(repository: Path, tmp_path: Path) -> None:
    mark = tmp_path / "saved/requeued"
    done = run_slurm(repository, tmp_path, TRAIN_ITERS="100")
    assert done.returncode == 0, done.stderr
    assert mark.read_text().strip() == SLURM_JOB["SLURM_JOB_ID"]
    mark.unlink()
    run_slurm(repository, tmp_path, TRAIN_ITERS="100")
    assert not mark.exists(), "it got no further: queueing it again would never end"
    run_slurm(repository, tmp_path, TRAIN_ITERS="100", REACHED="100")
    assert not mark.exists(), "it is finished"


def test_slurm_reads_how_many_iterations_the_epochs_are(repository: Path, tmp_path: Path) -> None:
    says = "megatron_multiturn: --train-epochs 2: 30 rows an epoch, so --train-iters"
    mark = tmp_path / "saved/requeued"
    for iterations, is_queued in ((100, True), (70, False)):
        srun = f"echo begins; echo '{says} {iterations}'; {SRUN}; echo ends"
        done = run_slurm(repository, tmp_path, srun=srun, TRAIN_EPOCHS="2")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"begins\n{says} {iterations}\nends\n")
        assert mark.exists() == is_queued
        for left in (mark, tmp_path / "saved/latest_checkpointed_iteration.txt"):
            left.unlink(missing_ok=True)


def test_slurm_asks_for_a_job(repository: Path) -> None:
    done = run_script(repository / "launch/train_slurm.sh", **SETTINGS)
    assert done.returncode != 0
    assert "sbatch" in done.stderr


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


def test_readme_names_every_flag_of_ours(repository: Path) -> None:
    from megatron_multiturn.arguments import add_multiturn_args
    from megatron_multiturn.averages import LOSS_AVERAGES

    readme = (repository / "README.md").read_text(encoding="utf-8")
    training = readme[readme.index("## Training") : readme.index("### Launching")]
    described = set(re.findall(r"^\| `(--[\w-]+)` \| ", training, re.MULTILINE))
    parser = add_multiturn_args(argparse.ArgumentParser(add_help=False))
    flags = {action.option_strings[0]: action.default for action in parser._actions}
    assert described - {"--loss-average"} == set(flags) - {"--loss-average"}
    for flag, default in flags.items():
        if default is not None and not isinstance(default, bool):
            assert f"| `{flag}` | `{default}` |" in readme
    for average in LOSS_AVERAGES:
        assert re.search(rf"^\| `{average}`.* \|$", readme, re.MULTILINE)


def test_readme_names_every_flag_of_the_selfcheck(repository: Path) -> None:
    from megatron_multiturn.selfcheck import parse

    readme = (repository / "README.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `--(check-[\w-]+)` \| ", readme, re.MULTILINE))
    options, _ = parse([])
    assert described == {name.replace("_", "-") for name in vars(options)}


def test_readme_names_every_refusal(repository: Path) -> None:
    from megatron_multiturn.refusals import REFUSALS

    readme = (repository / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("## Refused") : readme.index("## Limits")]
    assert len(REFUSALS) > 25
    for refusal in REFUSALS:
        for flag in re.findall(r"--[\w-]+", refusal.setting):
            assert f"`{flag}" in table, flag


def test_readme_names_modules_and_scripts_that_exist(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    _, _, after_picture = readme[readme.index("## How it works") :].split("```")
    named = set(re.findall(r"`(\w+)`", after_picture[: after_picture.index("## Refused")]))
    modules = {path.stem for path in (repository / "megatron_multiturn").glob("*.py")}
    assert len(named) > 5
    assert named <= modules
    paths = re.findall(r"\b(?:launch|tests|tools)/\w+\.\w+", readme)
    assert len(paths) > 5
    for path in paths:
        assert (repository / path).is_file(), path
