"""The staged recipe: what is done once is done once, and what was begun otherwise is said.

A stand-in for the interpreter does the work of preprocessing and training here;
`test_staged_training.py` trains.
"""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
from launch_scripts import add_commands, run_script, values_of, words_of

STAGES = ("1-dialogue", "2-knowledge", "3-instruction")

# Notes what it is asked for. What STOP_AT names it leaves half done, and ends as HOW says.
PYTHON = f"""
value_of() {{ # FLAG WORDS...: the word behind the flag
    local flag=$1; shift
    while (($#)); do [[ $1 != "$flag" ]] || echo "$2"; shift; done
}}
case "$2" in
    megatron_multiturn.preprocess)
        prefix=$(value_of --output-prefix "$@")
        step="preprocess $(basename "$(dirname "$prefix")")"
        echo "$step" >>calls
        [[ ${{STOP_AT:-}} != "$step" ]] || exit "${{HOW:-1}}"
        touch "$prefix.json" ;;
    torch.distributed.run)
        save=$(value_of --save "$@")
        step="train $(basename "$(dirname "$save")")"
        echo "$step from $(value_of --pretrained-checkpoint "$@")" >>calls
        if [[ ${{STOP_AT:-}} == "$step" ]]; then
            echo 5 >"$save/latest_checkpointed_iteration.txt"
            exit "${{HOW:-1}}"
        fi
        echo 10 >"$save/latest_checkpointed_iteration.txt"
        touch "$MULTITURN_END_MARK" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


class Recipe:
    """A folder with data of each kind, in which launch/staged/run.sh runs."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.script = repository / "launch/staged/run.sh"
        self.folder = folder
        add_commands(folder / "bin", python=PYTHON)
        (folder / "tokenizer.model").touch()
        for name in ("smile", "terms", "alpaca"):
            (folder / f"{name}.jsonl").write_text(f"{name}\n")

    def run(self, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "DIALOGUE_DATA": "smile.jsonl",
            "KNOWLEDGE_DATA": "terms.jsonl",
            "INSTRUCTION_DATA": "alp*.jsonl",
            "TOKENIZER_MODEL": "tokenizer.model",
            "WORK_DIR": "work",
            "MODEL": "tiny",
            "MULTITURN_PYTHON": str(self.folder / "bin/python"),
        }
        return run_script(self.script, *flags, cwd=self.folder, **{**settings, **variables})

    def calls(self) -> list[str]:
        """What was asked for since the last time."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def recipe(repository: Path, tmp_path: Path) -> Recipe:
    return Recipe(repository, tmp_path)


# An unbroken run: data first, so that a mistake in the last shows before the first is trained.
STEPS = [
    *(f"preprocess {stage}" for stage in STAGES),
    "train 1-dialogue from ",
    "train 2-knowledge from work/1-dialogue/checkpoint",
    "train 3-instruction from work/2-knowledge/checkpoint",
]


def test_each_stage_begins_with_the_one_before(recipe: Recipe) -> None:
    done = recipe.run()
    assert done.returncode == 0, done.stderr
    assert recipe.calls() == STEPS
    assert "the last checkpoint is in work/3-instruction/checkpoint" in done.stderr
    assert recipe.run().returncode == 0
    assert recipe.calls() == [], "all of it is finished"


def test_the_first_stage_may_begin_with_a_checkpoint(recipe: Recipe) -> None:
    (recipe.folder / "base").mkdir()
    assert recipe.run(PRETRAINED="base").returncode == 0
    assert "train 1-dialogue from base" in recipe.calls()


@pytest.mark.parametrize(
    ("step", "how"),
    [*((step, "1") for step in range(6)), (3, "0"), (5, "0")],
    ids=lambda value: {"1": "fails", "0": "stopped by a signal"}.get(value, str(value)),
)
def test_it_goes_on_from_every_point(step: int, how: str, recipe: Recipe) -> None:
    what = STEPS[step].split(" from ")[0]
    done = recipe.run(STOP_AT=what, HOW=how)
    assert done.returncode == 1
    assert what.split()[1] in done.stderr
    assert "the same command goes on" in done.stderr
    assert recipe.calls() == STEPS[: step + 1]
    assert recipe.run().returncode == 0
    assert recipe.calls() == STEPS[step:]


@pytest.mark.parametrize(
    ("changed", "stage", "was", "now"),
    [
        ({"KNOWLEDGE_EPOCHS": "6"}, 1, "epochs: 5", "epochs: 6"),
        ({"DIALOGUE_LEARNING_RATE": "3e-4"}, 0, "learning rate: 1e-4", "learning rate: 3e-4"),
        ({"INSTRUCTION_BATCH": "64"}, 2, "batch: 128", "batch: 64"),
        ({"DIALOGUE_WINDOW": "99"}, 0, "flags: --long-session window", "--session-window 99"),
        ({"TEMPLATE": "llama3"}, 0, "template: --template firefly", "template: --template llama3"),
        ({"KNOWLEDGE_PHRASINGS": "mine.txt"}, 1, "phrasings_en.txt", "mine.txt"),
        ({"MODEL": "gpt-0.3b"}, 0, "model: tiny", "model: gpt-0.3b"),
        ({"INSTRUCTION_DATA": "alpaca.jsonl"}, 2, "input: alp*.jsonl", "input: alpaca.jsonl"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_changed_setting_is_said(
    changed: dict[str, str], stage: int, was: str, now: str, recipe: Recipe
) -> None:
    recipe.run(PREPROCESS_ONLY="1")
    recipe.calls()
    done = recipe.run(**changed)
    assert done.returncode == 1
    assert f"{STAGES[stage]} was begun otherwise" in done.stderr
    lines = done.stderr.splitlines()
    assert any(line.startswith("  was: ") and was in line for line in lines)
    assert any(line.startswith("  now: ") and now in line for line in lines)
    assert f"remove work/{STAGES[stage]}" in done.stderr
    assert recipe.calls() == [], "nothing is done"
    assert recipe.run(PREPROCESS_ONLY="1").returncode == 0, "put back, it goes on"


@pytest.mark.parametrize("stop_at", ["train 2-knowledge", "train 3-instruction", ""])
def test_a_changed_setting_is_said_of_what_is_finished(stop_at: str, recipe: Recipe) -> None:
    recipe.run(STOP_AT=stop_at)
    recipe.calls()
    done = recipe.run(DIALOGUE_EPOCHS="3")
    assert done.returncode == 1
    assert "1-dialogue was begun otherwise:\n  was: epochs: 2\n  now: epochs: 3\n" in done.stderr
    assert recipe.calls() == []


def test_changed_data_are_said(recipe: Recipe) -> None:
    recipe.run(STOP_AT="train 2-knowledge")
    (recipe.folder / "terms.jsonl").write_text("more terms\n")
    done = recipe.run()
    assert done.returncode == 1
    assert "2-knowledge was begun otherwise" in done.stderr
    assert "terms.jsonl, 6 bytes" in done.stderr


def test_a_stage_behind_one_that_is_done_anew_is_stale(recipe: Recipe) -> None:
    recipe.run(STOP_AT="train 3-instruction")
    recipe.calls()
    for path in sorted((recipe.folder / "work/1-dialogue").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    done = recipe.run()
    assert recipe.calls() == ["preprocess 1-dialogue", "train 1-dialogue from "]
    assert done.returncode == 1
    assert "2-knowledge was begun otherwise" in done.stderr
    assert "remove work/2-knowledge, to do this stage and those behind it anew" in done.stderr


def test_what_is_missing_is_named(recipe: Recipe) -> None:
    done = recipe.run(INSTRUCTION_DATA="nothing*.jsonl")
    assert done.returncode == 1
    assert "3-instruction: nothing*.jsonl: no such file" in done.stderr
    done = recipe.run(KNOWLEDGE_DATA="")
    assert "KNOWLEDGE_DATA: set it to the files of knowledge" in done.stderr
    assert recipe.calls() == [], "before anything is done"


def test_only_one_run_at_a_time(recipe: Recipe) -> None:
    (recipe.folder / "work").mkdir()
    with (recipe.folder / "work/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = recipe.run()
        assert done.returncode == 1
        assert "another run is at work in work" in done.stderr
    assert recipe.calls() == []
    assert recipe.run(PREPROCESS_ONLY="1").returncode == 0


def test_datasets_alone(recipe: Recipe) -> None:
    assert recipe.run(PREPROCESS_ONLY="1").returncode == 0
    assert recipe.calls() == STEPS[:3]
    assert recipe.run().returncode == 0
    assert recipe.calls() == STEPS[3:]


def test_stages_of_ones_own(recipe: Recipe) -> None:
    mine = recipe.folder / "mine"
    mine.mkdir()
    (mine / "1-all.sh").write_text(
        "inputs=(smile.jsonl alpaca.jsonl) epochs=1 learning_rate=1e-3 global_batch_size=8\n"
        "window= preprocess_flags=(--train-on last) train_flags=(--long-session drop)\n"
    )
    done = recipe.run("--seed", "3", STAGES="mine", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    preprocess, _, train = done.stdout.partition("\n")
    assert values_of(words_of(preprocess), "--input") == ["smile.jsonl", "alpaca.jsonl"]
    assert values_of(words_of(preprocess), "--train-on") == ["last"]
    words = words_of(train)
    for flag, value in (
        ("--data-path", "work/1-all/data"),
        ("--train-epochs", "1"),
        ("--lr", "1e-3"),
        ("--min-lr", "0.0001"),
        ("--global-batch-size", "8"),
        ("--long-session", "drop"),
        ("--seed", "3"),
    ):
        assert values_of(words, flag) == [value]
    assert "--session-window" not in words
    assert not (recipe.folder / "work").exists()


def test_default_stages(recipe: Recipe) -> None:
    """2 epochs at 1e-4, 5 at 1e-4, 10 at 2e-5."""
    done = recipe.run(DRY_RUN="1", DIALOGUE_WINDOW="200")
    commands = done.stdout.replace("\\\n", "").splitlines()
    datasets, trainings = [words_of(x) for x in commands[::2]], map(words_of, commands[1::2])
    assert [values_of(words, "--prompt-variants")[0] for words in datasets[1:2]] == [
        str(recipe.script.parent / "phrasings_en.txt")
    ]
    found = [
        tuple(values_of(words, flag)[0] for flag in ("--train-epochs", "--lr", "--min-lr"))
        for words in trainings
    ]
    assert found == [("2", "1e-4", "1e-05"), ("5", "1e-4", "1e-05"), ("10", "2e-5", "2e-06")]
    assert "--session-window 200" in " ".join(words_of(commands[1]))
