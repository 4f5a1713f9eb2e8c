"""`python -m megatron_multiturn .../pretrain_gpt.py` on checkouts of several versions of Megatron.

MEGATRON_LM_PATH names real checkouts, separated by colons. Without it, stand-ins are made of the
installed Megatron, whose scripts call `pretrain` as those of 0.17 and 0.18 do.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from megatron_jobs import (
    MODEL_FLAGS,
    load_tensors,
    make_dataset,
    relative_difference,
    run_megatron,
)
from session_fixtures import make_record, tiny_sentencepiece

pytestmark = pytest.mark.distributed

CHECKOUTS = [Path(path) for path in os.environ.get("MEGATRON_LM_PATH", "").split(":") if path]
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "tests" / "scripts"
NUM_STEPS = 3
FLAGS = [
    *MODEL_FLAGS,
    *"--seq-length 256 --max-position-embeddings 256 --micro-batch-size 1".split(),
    *"--global-batch-size 4 --lr 1e-2 --lr-decay-iters 8 --log-interval 1 --num-workers 0".split(),
    *"--eval-interval 100 --eval-iters 0 --split 100,0,0 --no-load-optim --no-load-rng".split(),
    *f"--finetune --train-iters {NUM_STEPS}".split(),
]
LAYOUTS = {
    "one rank": (1, ""),
    "TP2, SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "CP2": (2, "--context-parallel-size 2"),
    "PP2, VPP2": (
        2,
        "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "experts, EP2": (
        2,
        "--num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2 "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-1 "
        "--moe-z-loss-coeff 1e-2",
    ),
    "MTP": (1, "--mtp-num-layers 1"),
}

# The installed Megatron's training, found beside the script as a checkout's own.
PACKAGE = """
    from pkgutil import extend_path
    __path__ = extend_path(__path__, __name__)
    from megatron.training.global_vars import *
    from megatron.training.global_vars import get_adlr_autoresume, get_one_logger, get_wandb_writer
    from megatron.training.initialize import initialize_megatron
    from megatron.training.utils import is_last_rank, print_rank_0, print_rank_last
    from megatron.training import arguments, training
    from megatron.training.argument_utils import (
        gpt_config_from_args, pretrain_cfg_container_from_args,
    )
    _pretrain = training.pretrain
    print("the training of the checkout")
"""
PRETRAIN = {
    "0.17": """
    def pretrain(
        train_valid_test_dataset_provider, model_provider, model_type, forward_step_func,
        process_non_loss_data_func=None, extra_args_provider=None, args_defaults={},
        get_embedding_ranks=None, store=None,
    ):
        args = arguments.parse_and_validate_args(extra_args_provider, args_defaults=args_defaults)
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        return _pretrain(
            config, train_valid_test_dataset_provider, model_type, forward_step_func,
            model_provider=model_provider, get_embedding_ranks=get_embedding_ranks, store=store,
        )
""",
    "0.18": """
    def pretrain(
        cfg_container, train_valid_test_dataset_provider, model_provider, model_type,
        forward_step_func, process_non_loss_data_func=None, get_embedding_ranks=None, store=None,
    ):
        return _pretrain(
            cfg_container, train_valid_test_dataset_provider, model_type, forward_step_func,
            model_provider=model_provider, get_embedding_ranks=get_embedding_ranks, store=store,
        )
""",
}
SCRIPT = """
    from functools import partial
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training import get_args, pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args, pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.arguments import parse_and_validate_args

    def provide(num_samples, vp_stage=None):
        raise SystemExit("the script's own datasets were asked for")

    provide.is_distributed = True

    def forward_step(data_iterator, model):
        raise SystemExit("the script's own forward step was taken")

    def build(args, pre_process, post_process, vp_stage=None, config=None, pg_collection=None):
        args = get_args()
        return GPTModel(
            core_transformer_config_from_args(args),
            get_gpt_layer_local_spec(normalization=args.normalization),
            args.padded_vocab_size,
            args.max_position_embeddings,
            pre_process,
            post_process,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            vp_stage=vp_stage,
        )

    def provide_model(builder, pre_process=True, post_process=True, vp_stage=None, **kwargs):
        return builder(None, pre_process, post_process, vp_stage)

    if __name__ == "__main__":
"""
CALL = {
    "0.17": """
        pretrain(
            provide, partial(provide_model, build), ModelType.encoder_or_decoder, forward_step,
            args_defaults={"tokenizer_type": "GPT2BPETokenizer"}, extra_args_provider=None,
        )
""",
    "0.18": """
        args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
        pretrain(
            pretrain_cfg_container_from_args(args, gpt_config_from_args(args)), provide,
            partial(provide_model, build), ModelType.encoder_or_decoder, forward_step,
        )
""",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    flags = make_dataset(
        folder, [make_record(turns=1 + n % 5) for n in range(40)], Path(tiny_sentencepiece())
    )
    return [*flags, "--data-cache-path", str(folder / "cache")]


@pytest.fixture(scope="module")
def wanted(data: list[str]) -> list[str]:
    """What the installed Megatron logs."""
    return logged(run_megatron([*FLAGS, *data], script=None).stdout)


def logged(output: str) -> list[str]:
    lines = re.findall(r"iteration +\d+/.*?(\| lm loss: .*? grad norm: \S+ \|)", output)
    assert len(lines) == NUM_STEPS, output[-3000:]
    return lines


def stand_in(folder: Path, version: str) -> Path:
    """The pretrain_gpt.py of a checkout in `folder`."""
    package = folder / "megatron" / "training"
    package.mkdir(parents=True)
    text = textwrap.dedent(PACKAGE) + textwrap.dedent(PRETRAIN[version])
    (package / "__init__.py").write_text(text)
    script = folder / "pretrain_gpt.py"
    script.write_text(textwrap.dedent(SCRIPT + CALL[version]))
    return script


@pytest.mark.parametrize("version", PRETRAIN)
def test_scripts_that_call_pretrain_otherwise(
    tmp_path: Path, data: list[str], wanted: list[str], version: str
) -> None:
    output = run_megatron([*FLAGS, *data], script=stand_in(tmp_path, version)).stdout
    assert "the training of the checkout" in output
    assert logged(output) == wanted


@pytest.mark.parametrize("version", PRETRAIN)
def test_the_scripts_own_datasets_stay_its_own(
    tmp_path: Path, data: list[str], version: str
) -> None:
    flags = [*FLAGS, *data, "--dataset-provider", "megatron"]
    output = run_megatron(flags, script=stand_in(tmp_path, version), check=False).stdout
    assert "the script's own datasets were asked for" in output


needs_checkouts = pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_LM_PATH names no checkout")


@needs_checkouts
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: path.name)
def test_checkouts_train_alike(
    tmp_path: Path, data: list[str], checkout: Path, layout: str
) -> None:
    """The first step's gradients, from the same weights, are those of the installed Megatron."""
    num_ranks, flags = LAYOUTS[layout]
    recorded = {}
    for name in ("installed", "checkout"):
        env = {"RECORD_DIR": str(tmp_path / name), "PYTHONPATH": f"{ROOT}:{SCRIPTS}"}
        script = SCRIPTS / "pretrain_and_record.py"
        if name == "checkout":
            env |= {"CHECKOUT": str(checkout), "PYTHONPATH": f"{checkout}:{ROOT}:{SCRIPTS}"}
            env["INITIAL_PARAMETERS"] = str(tmp_path / "installed" / "initial")
            script = SCRIPTS / "checkout_and_record.py"
        (tmp_path / name).mkdir()
        job = run_megatron(
            [*FLAGS, *data, *flags.split()],
            num_ranks=num_ranks, script=script, env=env, check=False,
        )  # fmt: skip
        if "isinstance() arg 2 must be a type" in job.stdout:
            pytest.skip("this Megatron itself builds no MTP without Transformer Engine")
        assert job.returncode == 0, job.stdout[-6000:]
        recorded[name] = load_tensors(tmp_path / name / "gradients-0")
    assert relative_difference(recorded["checkout"], recorded["installed"]) < 1e-5


@needs_checkouts
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: path.name)
def test_a_checkouts_own_script_is_left_as_it_was(tmp_path: Path, checkout: Path) -> None:
    """Megatron's own mock datasets, through the runner, by the script's own forward step."""
    flags = "--dataset-provider megatron --mock-data --tokenizer-type NullTokenizer --vocab-size 99"
    output = run_megatron([*FLAGS, *flags.split()], script=checkout / "pretrain_gpt.py").stdout
    assert len(re.findall(r"iteration +\d+/.*? lm loss: ", output)) == NUM_STEPS
    assert "turns:" not in output


def test_two_nodes_with_unlike_data_are_told_before_the_model_is_built(
    tmp_path: Path, data: list[str]
) -> None:
    """Each node finds its own files under the one name that the command gives."""
    for node, turns in enumerate((2, 3)):
        make_dataset(
            tmp_path / f"node-{node}", [make_record(turns=turns)] * 20, Path(tiny_sentencepiece())
        )
    flags = [*FLAGS, *data, "--data-path", "data"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(20000 + os.getpid() % 20000)]
    nodes = [
        subprocess.Popen(
            [*launcher, "--node-rank", str(node), "-m", "megatron_multiturn", *flags],
            cwd=tmp_path / f"node-{node}",
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    first, second = (node.communicate(timeout=120)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [1, 1]
    assert len(re.findall("error on rank", first + second)) == 1
    for output in (first, second):
        report = output[output.index("Root Cause (first observed failure)") :]
        assert "nodes have different data:" in report
        assert re.search(
            r"tokens of data: [\d,]+ on .* \(rank 0\), [\d,]+ on .* \(rank 1\)", report
        )
        assert "number of parameters on" not in output  # as Megatron says of a model
