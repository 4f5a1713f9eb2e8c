"""Runs the scripts of launch/ as a user does, and reads the commands that they print."""

import argparse
import os
import shlex
import subprocess
from pathlib import Path

SETTINGS = {"DATA_PATH": "0.3 a 0.7 b", "TOKENIZER_MODEL": "my tokenizer", "SAVE_DIR": "saved"}


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


def dry_run(repository: Path, *arguments: str, **variables: str) -> list[str]:
    """The words of the command that pretrain_torchrun.sh would run."""
    script = repository / "launch/pretrain_torchrun.sh"
    done = run_script(script, *arguments, DRY_RUN="1", **{**SETTINGS, **variables})
    assert done.returncode == 0, done.stderr
    return words_of(done.stdout)


def parsed(words: list[str]) -> argparse.Namespace:
    """The flags behind megatron_multiturn, which are all Megatron's or ours."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_multiturn.arguments import add_multiturn_args

    flags = words[words.index("megatron_multiturn") + 1 :]
    parser = add_multiturn_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    args, unknown = parser.parse_known_args(flags)
    assert unknown == []
    return args
