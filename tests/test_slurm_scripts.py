"""The scripts for SLURM, with stand-ins for its commands: what they ask for, and when they stop.

`test_slurm.py` runs them in a real one.
"""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from launch_scripts import add_commands, run_script, values_of, words_of

SETTINGS = {"DATA_PATH": "a", "TOKENIZER_MODEL": "tokenizer.model"}
JOB = {
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "96",
}
ARRAY = {
    "SLURM_JOB_ID": "41236",
    "SLURM_ARRAY_JOB_ID": "41234",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "3",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_CPUS_PER_TASK": "12",
    "SLURM_JOB_NAME": "corpus",
    "SLURM_JOB_PARTITION": "cpu",
    "OUTPUT_PREFIX": "out",
}
# Answers as SLURM's own commands do; what is queued again leaves a mark.
SCONTROL = """
case "$1 $2" in
    "show hostnames") [[ $3 == "node[7-8]" ]] && printf "node7\\nnode8\\n" ;;
    "show job") echo "JobId=$4 JobName=x Command=$SCRIPT WorkDir=/" ;;
    "show node") echo "NodeName=$4 Arch=x NodeAddr=10.0.0.${4#node} NodeHostName=$4" ;;
    requeue*) echo "$2" >>requeued ;;
esac
"""
GETENT = "[[ $2 == node8 ]]"


class Cluster:
    """A folder with stand-ins for SLURM's commands, in which the jobs run."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.repository = repository
        self.folder = folder
        self.requeued = folder / "requeued"
        (folder / "saved").mkdir()

    def run(
        self, script: str | Path, *arguments: str, srun: str = "exit 9", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        sbatch = 'printf "%s\\n" "$@" >queued; cat >>queued'
        path = add_commands(
            self.folder / "bin", scontrol=SCONTROL, srun=srun, getent=GETENT, sbatch=sbatch
        )
        settings = {
            **SETTINGS,
            "SAVE_DIR": str(self.folder / "saved"),
            "SCRIPT": str(self.repository / "launch" / script),
            "MULTITURN_PYTHON": "python",
            "PATH": path,
            **variables,
        }
        return run_script(
            self.repository / "launch" / script, *arguments, cwd=self.folder, **settings
        )


@pytest.fixture
def cluster(repository: Path, tmp_path: Path) -> Cluster:
    return Cluster(repository, tmp_path)


# srun "trains" to iteration $REACHED of 100.
TRAIN = (
    'echo "$REACHED" >"$SAVE_DIR/latest_checkpointed_iteration.txt"\n'
    'if ((REACHED == 100)); then touch "$MULTITURN_END_MARK"; fi'
)


def test_training_takes_everything_from_the_job(cluster: Cluster) -> None:
    done = cluster.run("pretrain.slurm", "--seed", "7", DRY_RUN="1", **JOB)
    assert done.returncode == 0, done.stderr
    step, _, command = done.stdout.partition("\n")
    asked = shlex.split(step)
    script = cluster.repository / "launch/pretrain_torchrun.sh"
    assert asked[-3:] == [str(script), "--seed", "7"]
    for flag, value in (("--nodes", "2"), ("--ntasks-per-node", "1"), ("--cpus-per-task", "96")):
        assert values_of(asked, flag)[0] == value
    assert "--container-image" not in asked
    words = words_of(command)
    for flag, value in (
        ("--nnodes", "2"),
        ("--node-rank", "0"),
        ("--nproc-per-node", "8"),
        ("--master-addr", "10.0.0.7"),  # its name does not resolve
        ("--exit-signal", "SIGUSR1"),
        ("--seed", "7"),
    ):
        assert values_of(words, flag) == [value]
    assert 1024 < int(values_of(words, "--master-port")[0]) < 32768


def test_a_name_that_resolves_is_taken(cluster: Cluster) -> None:
    job = {**JOB, "SLURM_JOB_NODELIST": "node8"}
    scontrol = SCONTROL.replace("node[7-8]", "node8").replace("node7\\n", "")
    path = add_commands(cluster.folder / "other", scontrol=scontrol, getent=GETENT)
    done = cluster.run("pretrain.slurm", **{**job, "DRY_RUN": "1", "PATH": path})
    assert values_of(words_of(done.stdout), "--master-addr") == ["node8"]


def test_outside_of_a_job_it_prints_what_it_would_do(cluster: Cluster) -> None:
    for script in ("pretrain.slurm", "preprocess.slurm"):
        done = cluster.run(script, DRY_RUN="1", OUTPUT_PREFIX="out")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("srun ")
        done = cluster.run(script, OUTPUT_PREFIX="out")
        assert done.returncode != 0
        assert "run this with sbatch" in done.stderr


def test_training_in_a_container(cluster: Cluster) -> None:
    container = {"CONTAINER_IMAGE": "nvcr.io#image", "DRY_RUN": "1", "MULTITURN_PYTHON": ""}
    done = cluster.run("pretrain.slurm", **JOB, **container)
    assert done.returncode == 0, done.stderr
    step, _, command = done.stdout.partition("\n")
    asked = shlex.split(step)
    assert values_of(asked, "--container-image") == ["nvcr.io#image"]
    root, folder = cluster.repository, cluster.folder
    assert values_of(asked, "--container-mounts") == [f"{root}:{root},{folder}:{folder}"]
    assert values_of(asked, "--container-workdir")[0] == str(folder)
    assert words_of(command)[0] == "python3", "the image's own"


def test_an_unfinished_job_is_queued_again(cluster: Cluster) -> None:
    done = cluster.run("pretrain.slurm", srun=TRAIN, REACHED="70", **JOB)
    assert done.returncode == 0, done.stderr
    assert cluster.requeued.read_text() == "41234\n"
    cluster.requeued.unlink()
    done = cluster.run("pretrain.slurm", srun=TRAIN, REACHED="70", **JOB)
    assert not cluster.requeued.exists(), "it got no further: queueing it again would never end"
    assert done.returncode == 1
    assert "give it more time (--time)" in done.stderr
    done = cluster.run("pretrain.slurm", srun=TRAIN, REACHED="100", **JOB)
    assert done.returncode == 0
    assert not cluster.requeued.exists(), "it is finished"
    # To be longer now: the mark of the last end does not count.
    done = cluster.run("pretrain.slurm", srun=TRAIN, REACHED="110", **JOB)
    assert cluster.requeued.exists()


def test_a_job_that_fails_is_not_queued_again(cluster: Cluster) -> None:
    done = cluster.run("pretrain.slurm", srun=f"{TRAIN}; exit 3", REACHED="70", **JOB)
    assert done.returncode == 3
    assert not cluster.requeued.exists()


@pytest.mark.parametrize("script", ["pretrain.slurm", "preprocess.slurm"])
def test_a_copy_finds_the_checkout(script: str, cluster: Cluster, tmp_path: Path) -> None:
    """SLURM runs a copy of the file, of which only `Command=` says where it was."""
    spooled = Path(shutil.copy(cluster.repository / "launch" / script, tmp_path / "slurm_script"))
    job = {**JOB, **ARRAY, "DRY_RUN": "1"}
    done = cluster.run(spooled, **{**job, "SCRIPT": str(cluster.repository / "launch" / script)})
    assert done.returncode == 0, done.stderr
    for more in ({"MULTITURN_ROOT": str(cluster.repository)}, {}):
        done = cluster.run(spooled, **{**job, "SCRIPT": "/home/me/mine.slurm"}, **more)
        assert (done.returncode == 0) == bool(more)
    assert "set MULTITURN_ROOT to its folder" in done.stderr
    submitted = {"SLURM_SUBMIT_DIR": str(cluster.repository)}
    done = cluster.run(spooled, **{**job, "SCRIPT": "(null)"}, **submitted)
    assert done.returncode == 0, done.stderr


def test_preprocessing_takes_its_shard_from_the_array(cluster: Cluster) -> None:
    srun = 'printf "%s\\n" "$@" >asked'
    array = {**ARRAY, "SLURM_ARRAY_TASK_ID": "2"}
    done = cluster.run("preprocess.slurm", "--input", "my corpus", srun=srun, **array)
    assert done.returncode == 0, done.stderr
    asked = (cluster.folder / "asked").read_text().splitlines()
    for flag, value in (
        ("--cpus-per-task", "12"),
        ("--input", "my corpus"),
        ("--output-prefix", "out"),
        ("--shard", "2/4"),
        ("--workers", "12"),
    ):
        assert values_of(asked, flag)[0] == value
    assert not (cluster.folder / "queued").exists(), "the first task queues the merge"


def test_the_first_task_queues_the_merge(cluster: Cluster) -> None:
    done = cluster.run("preprocess.slurm", srun=":", **ARRAY)
    assert done.returncode == 0, done.stderr
    queued = (cluster.folder / "queued").read_text()
    words, _, script = queued.partition("#!")
    for flag, value in (("--dependency", "afterok:41234"), ("--partition", "cpu")):
        assert values_of(words.splitlines(), flag) == [value]
    assert "--kill-on-invalid-dep=yes" in words
    assert script.rstrip().endswith("python -m megatron_multiturn.merge out")
    # Queued again at its time limit, it does not queue another one; and what is done is done.
    (cluster.folder / "queued").unlink()
    (cluster.folder / "out.shard-00000-of-00004.shard.json").touch()
    done = cluster.run("preprocess.slurm", srun="exit 9", SLURM_RESTART_COUNT="1", **ARRAY)
    assert done.returncode == 0
    assert "out.shard-00000-of-00004 is complete" in done.stderr
    assert not (cluster.folder / "queued").exists()


def test_failed_tasks_are_repeated_alone(cluster: Cluster) -> None:
    srun = 'printf "%s\\n" "$@" >asked'
    some = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    some = {**ARRAY, **some, "SLURM_ARRAY_TASK_COUNT": "2"}
    done = cluster.run("preprocess.slurm", srun=srun, **some)
    assert done.returncode == 1
    assert "SHARDS=16 sbatch --array 3,7" in done.stderr
    done = cluster.run("preprocess.slurm", srun=srun, SHARDS="16", **some)
    assert done.returncode == 0, done.stderr
    asked = (cluster.folder / "asked").read_text().splitlines()
    assert values_of(asked, "--shard") == ["3/16"]
    assert (cluster.folder / "queued").exists()
    done = cluster.run("preprocess.slurm", srun=srun, SHARDS="3", **some)
    assert done.returncode == 1
    assert "task 3 is not one of SHARDS=3" in done.stderr


def test_a_stopped_task_is_queued_again_if_it_got_on(cluster: Cluster) -> None:
    stopped = {**ARRAY, "SLURM_ARRAY_TASK_ID": "2"}
    folder = "out.shard-00002-of-00004.unfinished"
    done = cluster.run(
        "preprocess.slurm",
        srun=f"mkdir -p {folder}; echo more >>{folder}/journal.json; exit 143",
        **stopped,
    )
    assert done.returncode == 0, done.stderr
    assert cluster.requeued.read_text() == "41234_2\n", "its own number, not that of the array"
    cluster.requeued.unlink()
    done = cluster.run("preprocess.slurm", srun="exit 143", **stopped)
    assert done.returncode == 1
    assert "give it more time (--time)" in done.stderr
    done = cluster.run("preprocess.slurm", srun="exit 1", **stopped)
    assert done.returncode == 1
    assert not cluster.requeued.exists(), "an error comes again"


def test_a_merge_that_cannot_be_queued_is_said(cluster: Cluster) -> None:
    path = add_commands(
        cluster.folder / "other", sbatch="exit 1", srun=":", scontrol=SCONTROL, getent=GETENT
    )
    done = cluster.run("preprocess.slurm", **{**ARRAY, "PATH": path})
    assert done.returncode == 1
    assert "run: python -m megatron_multiturn.merge out" in done.stderr
