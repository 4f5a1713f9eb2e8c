"""Runs the scripts of launch/ as a user does, and reads the commands that they print."""

import os
import shlex
import subprocess
from pathlib import Path


def run_script(
    script: Path, *arguments: str, cwd: Path | str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with a clean environment, PATH apart, and `variables`."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.run(
        [str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


def words_of(command: str) -> list[str]:
    """The words of a shell command over several lines."""
    return shlex.split(command.replace("\\\n", ""))


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
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"
