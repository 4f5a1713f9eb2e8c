"""The README: what it names exists, and what exists it names."""

import argparse
import re
from pathlib import Path


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
    paths = re.findall(r"\b(?:launch|tests|tools)/[\w/.-]+\.\w+", readme)
    assert len(paths) > 5
    for path in paths:
        assert (repository / path).is_file(), path
