"""Runs Megatron's training with packed sessions: `torchrun -m megatron_multiturn [SCRIPT.py] ...`.

SCRIPT.py is the user's own, unmodified pretrain_gpt.py; its checkout is the Megatron that runs.
Without a script the installed megatron-core builds and trains a GPT. Every flag of Megatron's
is accepted, and those of `arguments.add_multiturn_args`.
"""

import argparse
import contextlib
import functools
import json
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_multiturn.errors import ConfigError, MultiTurnError

# The environment variable with the file by which rank 0 says that training has come to its end. A
# run that a signal or the clock ends before its time exits with status 0 too, but from inside.
END_MARK = "MULTITURN_END_MARK"

# torchrun takes the earliest error for the cause, in whole seconds; so much later than it came
# does the error of a rank count that has only lost another one.
_ECHO_SECONDS = 2


def main(argv: list[str] | None = None) -> None:
    """Train; exits with status 1 and a message for an error that the user can put right."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except MultiTurnError as error:
        # What is wrong with the flags is wrong on every rank; one of them says so.
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or not isinstance(error, ConfigError):
            print(f"megatron_multiturn: error on rank {rank}: {error}", file=sys.stderr, flush=True)
        _tell_launcher(str(error))
        sys.exit(1)
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        _tell_launcher(text, delay=_ECHO_SECONDS if _is_echo(error) else 0)
        raise
    mark = os.environ.get(END_MARK)
    if mark and os.environ.get("RANK", "0") == "0":
        Path(mark).touch()


def _tell_launcher(message: str, *, delay: int = 0) -> None:
    """Leave the error where torchrun looks for it, to show that of the rank that failed first."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message, "timestamp": int(time.time()) + delay}, file)


def _is_echo(error: Exception) -> bool:
    """Whether it says no more than that another rank is gone."""
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def split_script(argv: list[str]) -> tuple[Path | None, list[str]]:
    """(script, Megatron's flags): the script is the first argument unless that is a flag."""
    if not argv or argv[0].startswith("-"):
        return None, argv
    script = Path(argv[0])
    if not script.is_file():
        raise ConfigError(
            f"{script}: no such script; the first argument is Megatron's pretrain_gpt.py, or leave "
            "it out to train a GPT with the installed megatron-core"
        )
    return script, argv[1:]


def run(argv: list[str], *, after_hooks: Callable[[bool], None] | None = None) -> None:
    """What `main` does, with errors raised.

    after_hooks: called with whether there is no GPU, when Megatron is hooked and not yet begun.
    """
    script, flags = split_script(argv)
    if script is not None:
        # Its checkout comes first: megatron and the script's own modules are found there.
        sys.path.insert(0, str(script.resolve().parent))
    sys.argv = [str(script or "megatron_multiturn"), *flags]
    if "-h" in flags or "--help" in flags:
        _print_help()
        return

    from megatron_multiturn import cpu

    on_cpu = cpu.is_needed()
    if on_cpu:
        cpu.install()
    _hook_megatron(on_cpu=on_cpu, has_script=script is not None)
    if after_hooks is not None:
        after_hooks(on_cpu)
    if script is not None:
        runpy.run_path(str(script), run_name="__main__")
    else:
        from megatron_multiturn import megatron_compat

        if megatron_compat.is_older_than(0, 19):
            raise ConfigError(
                "the installed megatron-core is older than 0.19, and trains by a script alone: "
                "pass pretrain_gpt.py of its checkout as the first argument"
            )
        megatron_compat.run_gpt()


def _print_help() -> None:
    from megatron_multiturn.arguments import add_multiturn_args

    parser = argparse.ArgumentParser(
        prog="torchrun ... -m megatron_multiturn",
        usage="%(prog)s [SCRIPT.py] [Megatron's flags] [the flags below]",
        description="Train a GPT on packed multi-turn sessions with Megatron.",
        epilog="Megatron's flags are in megatron/training/arguments.py of the Megatron that runs.",
    )
    add_multiturn_args(parser).print_help()


def _hook_megatron(*, on_cpu: bool, has_script: bool) -> None:
    from megatron_multiturn import megatron_hooks
    from megatron_multiturn.arguments import add_multiturn_args, prepare_args
    from megatron_multiturn.loss import COUNTS
    from megatron_multiturn.mtp import roll_within_pieces
    from megatron_multiturn.resume import remember_checkpoint

    def prepare(args: argparse.Namespace) -> None:
        # A YAML configuration has none of our flags, and is refused.
        vars(args).setdefault("dataset_provider", "multiturn")
        if args.dataset_provider == "megatron" and not has_script:
            raise ConfigError(
                "--dataset-provider megatron needs a SCRIPT.py, whose datasets and loss it uses; "
                "pass pretrain_gpt.py of your checkout as the first argument"
            )
        for notice in prepare_args(args, on_cpu=on_cpu):
            if args.rank == 0:
                print(f"megatron_multiturn: {notice}", flush=True)

    def epoch_of(num_rows: int) -> float | None:
        from megatron_multiturn.provider import training_epoch

        return training_epoch(num_rows)

    megatron_hooks.skip_needless_compilation()
    megatron_hooks.hook_arguments(add_multiturn_args, prepare)
    megatron_hooks.hook_pretrain(functools.partial(_replacements, on_cpu=on_cpu))
    megatron_hooks.hook_initialization(_check_data)
    megatron_hooks.hook_checkpoint_arguments(remember_checkpoint)
    megatron_hooks.hook_model(
        functools.partial(_adapt_layers, on_cpu=on_cpu), _adapt_mtp, roll_within_pieces
    )
    megatron_hooks.hook_log_lines(COUNTS, epoch_of)


def _replacements(args: argparse.Namespace, *, on_cpu: bool) -> dict[str, Any]:
    """What `pretrain` gets in place of the script's."""
    if args.dataset_provider == "megatron":
        return {}
    from megatron_multiturn import megatron_hooks
    from megatron_multiturn.arguments import has_apex
    from megatron_multiturn.forward import forward_step
    from megatron_multiturn.provider import select_provider

    if not on_cpu:
        megatron_hooks.compile_rotary_embedding()
        if args.gradient_accumulation_fusion and not has_apex():
            megatron_hooks.fuse_gradient_accumulation()
    return {
        "train_valid_test_dataset_provider": select_provider(args.dataset_provider),
        "forward_step_func": forward_step,
    }


def _check_data() -> None:
    from megatron_multiturn import megatron_compat
    from megatron_multiturn.preflight import check_data

    args = megatron_compat.get_args()
    if args.dataset_provider == "multiturn":
        check_data(args)


def _adapt_layers(spec: Any, config: Any, vp_stage: int | None, *, on_cpu: bool) -> Any:
    from megatron_multiturn import megatron_compat
    from megatron_multiturn.layer_spec import adapt_layer_spec

    args = megatron_compat.get_args()
    if args.dataset_provider == "megatron":
        return spec
    if on_cpu:
        megatron_compat.keep_what_is_sent(config)
    return adapt_layer_spec(spec, config, vp_stage, kernels=args.packed_attention)


def _adapt_mtp(block: Any, config: Any) -> None:
    from megatron_multiturn import megatron_compat
    from megatron_multiturn.layer_spec import adapt_mtp_spec

    args = megatron_compat.get_args()
    if args.dataset_provider != "megatron":
        adapt_mtp_spec(block, config, kernels=args.packed_attention)


if __name__ == "__main__":
    main()
