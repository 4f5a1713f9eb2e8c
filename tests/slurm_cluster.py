"""A SLURM of two nodes on this machine: its daemons on loopback, everything in one folder.

It needs the programs of the packages slurm-wlm and munge, and no configuration, service or right
of the system's: munged has a key and a socket of its own, and the two slurmd answer to the names
n1 and n2 on ports of their own.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

PROGRAMS = (
    *("munged", "slurmctld", "slurmd"),
    *("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo"),
)

# srun in a job needs an authority over nothing but its own processes: no control groups.
_CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
MpiDefault=none
MailProg={mail_program}
ReturnToService=2
KillWait=5
SlurmdDebug=verbose
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first_port} CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second_port} CPUs=1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Those of SLURM's and munge's programs that are not in PATH or beside the system's daemons."""
    return [name for name in PROGRAMS if _find(name) is None]


def _find(name: str) -> str | None:
    # Daemons lie in folders that only the administrator's PATH holds.
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class SlurmCluster:
    """Nodes n1 and n2, of one CPU each; a context manager that starts and stops the daemons."""

    def __init__(self) -> None:
        # Not in pytest's folder: the name of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1:
            self.command("scancel", "--user", getpass.getuser(), check=False)
            _wait_until(lambda: not self.command("squeue", "-h", check=False), 30)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self.folder.chmod(0o755)
        for name in ("state", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir()
        controller_port, first_port, second_port = _free_ports(3)
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder,
                user=getpass.getuser(),
                controller_port=controller_port,
                first_port=first_port,
                second_port=second_port,
                mail_program=shutil.which("true"),
            )
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = ("socket", "key-file", "pid-file", "log-file", "seed-file")
        files = (self.folder / f"munge.{name.removesuffix('-file')}" for name in names)
        munge = [f"--{name}={file}" for name, file in zip(names, files, strict=True)]
        # --force: the folder's parents are as they are.
        self._spawn("munged", "--foreground", "--force", "--num-threads=1", *munge)
        self._expect((self.folder / "munge.socket").exists, "munged made no socket")
        self._spawn("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", node)
        self._expect(
            lambda: self.command("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2",
            "the nodes did not come up",
        )

    def _spawn(self, name: str, *arguments: str) -> None:
        program = _find(name)
        assert program is not None, name
        with (self.folder / f"{name}{len(self._daemons)}.out").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments],
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )

    def _expect(self, condition: Callable[[], bool], complaint: str) -> None:
        if not _wait_until(condition, 30):
            logs = [f"--- {file.name}\n{file.read_text()[-3000:]}" for file in self._logs()]
            raise AssertionError("\n".join([complaint, *logs]))

    def _logs(self) -> list[Path]:
        return sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])

    def environment(self, **variables: str) -> dict[str, str]:
        """That of this process, without what an enclosing job or torchrun has put there."""
        own = ("SLURM_", "SBATCH_", "SRUN_", "PYTEST_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), **variables}

    def command(
        self,
        *words: str,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> str:
        """Run one of SLURM's commands; what it printed, stripped."""
        done = subprocess.run(
            list(words),
            cwd=cwd,
            env=self.environment(**(variables or {})),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, *words: str, cwd: Path, **variables: str) -> str:
        """Sbatch; the job's number."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd, variables=variables)

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, of one job that is no array: JobState, Restarts, ..."""
        pairs = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(pair.partition("=")[::2] for pair in pairs)

    def wait(self, jobs: Sequence[str], timeout: float, logs: Callable[[], str]) -> None:
        """Until no job is queued or running; every one must have completed.

        logs: what to show when one did not.
        """

        def is_over() -> bool:
            states = "pending,running,completing,configuring,suspended,requeued"
            return not self.command("squeue", "-h", "-j", ",".join(jobs), "-t", states, check=False)

        over = _wait_until(is_over, timeout)
        states = {job: self.command("scontrol", "-o", "show", "job", job) for job in jobs}
        failed = [
            job
            for job, text in states.items()
            if any("JobState=COMPLETED" not in line for line in text.splitlines())
        ]
        if failed or not over:
            raise AssertionError(f"{states}\n{logs()}")


def _wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
