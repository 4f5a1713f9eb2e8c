"""The runner as a user meets it: `torchrun -m megatron_multiturn [SCRIPT.py] ...`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_jobs import MODEL_FLAGS, SCRIPT, make_dataset, run_megatron
from session_fixtures import make_record, tiny_hugging_face, tiny_sentencepiece

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    *MODEL_FLAGS,
    *"--seq-length 128 --max-position-embeddings 128 --micro-batch-size 2".split(),
    *"--global-batch-size 4 --lr 1e-2 --lr-decay-iters 8 --log-interval 1 --num-workers 0".split(),
    *"--eval-interval 100 --eval-iters 0".split(),
]
TOKENIZER = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two datasets whose rows hold unlike numbers of pieces."""
    folder = tmp_path_factory.mktemp("runner")
    made = []
    for name, turns in (("short", 1), ("long", 4)):
        records = [make_record(turns=turns) for _ in range(24)]
        make_dataset(folder / name, records, Path(tiny_sentencepiece()))
        made.append(str(folder / name / "data"))
    return made


def run(*flags: str, cache: Path, **options: object) -> subprocess.CompletedProcess[str]:
    data = [*TOKENIZER, tiny_sentencepiece(), "--data-cache-path", str(cache)]
    return run_megatron([*FLAGS, *data, *flags], **options)  # type: ignore[arg-type]


def logged(output: str, name: str) -> dict[int, float]:
    """Step -> the value of `name` in Megatron's log."""
    lines = re.findall(rf"iteration +(\d+)/.*?\| {name}: (\S+) \|", output)
    return {int(step): float(value) for step, value in lines}


def test_built_in_entry_trains_evaluates_saves_and_resumes(
    tmp_path: Path, prefixes: list[str]
) -> None:
    data = ["--train-data-path", "0.5", prefixes[0], "0.5", prefixes[1]]
    data += ["--valid-data-path", prefixes[1], "--eval-interval", "2", "--eval-iters", "2"]
    common = [*data, "--tensor-model-parallel-size", "2", "--save", str(tmp_path / "saved")]
    common += ["--train-iters", "4", "--save-interval", "2"]
    first = run(
        *common,
        cache=tmp_path / "cache", script=None, num_ranks=2,
    ).stdout  # fmt: skip
    losses = logged(first, "lm loss")
    assert set(losses) == {1, 2, 3, 4} == set(logged(first, "token loss"))
    assert losses[4] < losses[1]
    assert re.search(r"validation loss at iteration 2 \| lm loss value: .*token loss value", first)
    assert "NO GPU: this run is on the CPU" in first
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = run(
        *common, "--load", str(tmp_path / "saved"),
        cache=tmp_path / "cache", script=None, num_ranks=2,
    ).stdout  # fmt: skip
    assert logged(resumed, "lm loss")[3] == losses[3]
    # Megatron logs the second step of a process averaged with its first, but for this:
    norms = logged(first, "grad norm")
    assert logged(resumed, "grad norm") == {3: norms[3], 4: norms[4]}


def test_provider_of_the_users_own(tmp_path: Path, prefixes: list[str]) -> None:
    module = tmp_path / "my_provider.py"
    module.write_text(
        "from megatron_multiturn.provider import train_valid_test_datasets_provider as packed\n"
        "class FirstRows:\n"
        "    def __init__(self, rows): self.rows = rows\n"
        "    def __len__(self): return len(self.rows)\n"
        "    def __getitem__(self, index): return self.rows[index % 4]\n"
        "def provide(num_samples, vp_stage=None):\n"
        "    print('my own provider was called')\n"
        "    return FirstRows(packed(num_samples)[0]), None, None\n"
    )
    output = run(
        "--dataset-provider", "my_provider:provide", "--data-path", prefixes[0],
        "--split", "100,0,0", "--train-iters", "2", "--lr", "0",
        cache=tmp_path / "cache", script=None, env={"PYTHONPATH": str(tmp_path)},
    ).stdout  # fmt: skip
    assert "my own provider was called" in output
    losses = logged(output, "lm loss")
    assert losses[1] == losses[2]  # the same four rows, and nothing is learnt


def refused(*flags: str, cache: Path, **options: object) -> str:
    """The error of a run that must fail, and say so in one place without a traceback of ours."""
    process = run(*flags, "--train-iters", "2", cache=cache, check=False, **options)
    assert process.returncode != 0
    (message,) = re.findall(r"^megatron_multiturn: error on rank 0: .*", process.stdout, re.M)
    return str(message)


def test_no_data_is_refused(tmp_path: Path) -> None:
    message = refused(cache=tmp_path, script=None, num_ranks=2)
    assert re.search(r"no data: pass --data-path PREFIX .*megatron-multiturn-preprocess", message)


def test_missing_dataset_is_refused(tmp_path: Path) -> None:
    message = refused("--data-path", "nowhere", "--split", "1,0,0", cache=tmp_path, script=None)
    assert re.search(r"nowhere.json: no manifest.*correct the prefix", message)


def test_dataset_of_another_tokenizer_is_refused(tmp_path: Path, prefixes: list[str]) -> None:
    other = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tiny_hugging_face()]
    data = ["--data-path", prefixes[0], "--split", "100,0,0"]
    message = refused(*other, *data, cache=tmp_path, script=None)
    assert re.search(r"made with another tokenizer: SentencePieceTokenizer .* preprocess", message)


def test_unknown_provider_is_refused(tmp_path: Path, prefixes: list[str]) -> None:
    message = refused("--dataset-provider", "json:nothing", cache=tmp_path, script=None)
    assert re.search(r"--dataset-provider json:nothing: .*MODULE must be importable", message)


def quickly_refused(*arguments: str) -> str:
    """The same for what is refused before there are process groups; in one plain process."""
    process = subprocess.run(
        [sys.executable, "-m", "megatron_multiturn", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    return process.stderr


def test_wrong_flags_are_told_in_a_line(tmp_path: Path) -> None:
    for flags, message in (
        (["--loss-average", "trun"], "argument --loss-average: invalid choice: 'trun'"),
        (["--data-pth", "x"], "unrecognized arguments: --data-pth x"),
    ):
        error = quickly_refused(*FLAGS, *flags)
        assert message in error
        assert "usage:" not in error


def test_without_a_gpu_megatron_uses_nothing_that_needs_one(tmp_path: Path) -> None:
    """It takes Transformer Engine's optimizer, say, wherever that can be imported."""
    for name in ("transformer_engine", "apex", "amp_C", "flash_attn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(f'{__name__} is loaded')")
    program = (
        "from megatron_multiturn import cpu; cpu.install()\n"
        "import megatron.core.optimizer, megatron.core.extensions.transformer_engine as te\n"
        "from megatron_multiturn.arguments import has_module\n"
        "print(te.HAVE_TE, has_module('transformer_engine'))"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    for line, loads in ((program, False), ("import megatron.core.optimizer", True)):
        done = subprocess.run(
            [sys.executable, "-c", line],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ("is loaded" in done.stderr) == loads
        assert done.stdout.split() == ([] if loads else ["False", "False"])


def test_missing_script_is_refused() -> None:
    assert "nowhere.py: no such script" in quickly_refused("nowhere.py", "--num-layers", "2")


def test_flags_that_would_bias_are_refused() -> None:
    message = quickly_refused(*FLAGS, "--sft", "--attention-dropout", "0.1")
    assert re.search(r"(?s)--sft: .*--attention-dropout above 0: .*--attention-dropout 0", message)


def test_help_lists_our_flags() -> None:
    command = [sys.executable, "-m", "megatron_multiturn", "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--loss-average {turn,token,session,session-token,prefix,sqrt}" in output


def test_megatrons_datasets_need_its_script() -> None:
    message = quickly_refused(*FLAGS, "--dataset-provider", "megatron")
    assert "needs a SCRIPT.py" in message


@pytest.mark.parametrize("boundaries", ["pieces", "whole-row"])
def test_a_changed_token_reaches_no_other_piece(
    boundaries: str, tmp_path: Path, prefixes: list[str]
) -> None:
    """On the logits of a whole GPT; with the boundaries taken away the same probe finds a leak."""
    import json

    process = run(
        "--data-path", prefixes[0], "--split", "100,0,0", "--train-iters", "1",
        "--no-balance-data-parallel",  # the probe looks at the plan
        cache=tmp_path, script=SCRIPT.with_name("probe_isolation.py"),
        env={"ATTENTION": boundaries},
    )  # fmt: skip
    (line,) = re.findall(r"^\{\"changed_piece.*\}$", process.stdout, re.M)
    probe = json.loads(line)
    others = [
        change
        for piece, change in enumerate(probe["change_by_piece"])
        if piece != probe["changed_piece"]
    ]
    assert len(others) >= 3
    assert probe["change_by_piece"][probe["changed_piece"]] > 1e-3
    assert probe["change_before_position"] == 0.0
    if boundaries == "pieces":
        assert max(others) == 0.0
    else:
        assert max(others) > 1e-3


def test_the_end_of_training_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what ends before: Megatron leaves by sys.exit when a signal or the clock tells it to."""
    from megatron_multiturn import __main__ as runner

    mark = tmp_path / "finished"
    monkeypatch.setenv(runner.END_MARK, str(mark))

    def stopped_early(_argv: list[str]) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(runner, "run", stopped_early)
    with pytest.raises(SystemExit):
        runner.main([])
    assert not mark.exists()

    monkeypatch.setattr(runner, "run", lambda _argv: None)
    monkeypatch.setenv("RANK", "1")
    runner.main([])
    assert not mark.exists(), "rank 0 says it"
    monkeypatch.setenv("RANK", "0")
    runner.main([])
    assert mark.exists()
