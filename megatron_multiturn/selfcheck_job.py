"""The two jobs of a selfcheck: `python -m megatron_multiturn.selfcheck_job ROLE FOLDER ...`.

What follows is the command line of `python -m megatron_multiturn`. Both roles run Megatron's own
training with the plugin in it, up to the optimizer, which changes nothing:

    layout     every rank of the user's job, in the user's layout; records weights and gradients
    reference  one rank, with those weights and the same rows; compares, and writes the report

No Megatron is imported before the runner has put the script's own first.

The folder holds `check.json`, what is asked for; then `layout.json`, `initial/`, `gradients-N/`
and `losses-N.json` of the layout, `report.json` of the reference, and `failure-R.json` of a rank
that failed.
"""

import argparse
import copy
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_multiturn import selfcheck_flags
from megatron_multiturn.errors import ConfigError, MultiTurnError
from megatron_multiturn.recording import (
    Recording,
    gradient_parts,
    load_parameters,
    parameter_parts,
    save_parts,
)
from megatron_multiturn.selfcheck_hooks import Job, run_hooked
from megatron_multiturn.selfcheck_ranks import read_json, write_json

Namespace = argparse.Namespace


class _Done(BaseException):
    """The last batch is checked; ends the process from inside Megatron's training loop."""


class LayoutJob:
    """The user's own layout: records what it computes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._check = read_json(folder / "check.json")
        self._batch = 0
        self._grad_norm = 0.0
        self._notices: list[str] = []

    def prepare(self, args: Namespace, parser: argparse.ArgumentParser, *, on_cpu: bool) -> None:
        if args.dataset_provider == "megatron":
            raise ConfigError(
                "--dataset-provider megatron trains the script's own objective; the selfcheck is "
                "for that of this plugin: remove the flag"
            )
        from megatron_multiturn.arguments import prepare_args

        # What the job would be refused for is refused, also where the check changes the flag.
        prepare_args(copy.deepcopy(args), on_cpu=on_cpu)
        self._on_cpu = on_cpu
        self._notices += _prepare_both(args, parser, self._check)
        num_given = selfcheck_flags.limit_global_batch(args, 0)
        num_checked = selfcheck_flags.limit_global_batch(args, self._check["micro_batches"])
        if num_checked < num_given:
            self._notices.append(
                f"{num_checked} of {num_given} micro-batches a global batch (--check-micro-batches)"
            )
        self._notices.append(_origin_of_weights(args))

    def finish_args(self, args: Namespace) -> None:
        """The flags stay."""

    def begin(self, model: Any, optimizer: Any) -> None:
        parts = parameter_parts(model)
        save_parts(self._folder / "initial", parts, rank=torch.distributed.get_rank())
        if torch.distributed.get_rank() == 0:
            from megatron_multiturn.megatron_compat import get_args

            write_json(self._folder / "layout.json", self._description(get_args()))

    def _description(self, args: Namespace) -> dict[str, Any]:
        names = "tensor_model pipeline_model context expert_model expert_tensor data".split()
        return {
            **{f"{name}_parallel_size": getattr(args, f"{name}_parallel_size") for name in names},
            "world_size": args.world_size,
            "virtual_stages": args.virtual_pipeline_model_parallel_size or 1,
            "sequence_parallel": args.sequence_parallel,
            "distributed_optimizer": args.use_distributed_optimizer,
            "num_experts": args.num_experts,
            "micro_batch_size": args.micro_batch_size,
            "global_batch_size": args.global_batch_size,
            "loss_average": args.loss_average,
            "piece_multiple": args.piece_multiple,
            "dtype": str(args.params_dtype).removeprefix("torch."),
            "device": "CPU" if self._on_cpu else torch.cuda.get_device_name(),
            "notices": self._notices,
        }

    def forward_step(self, given: Callable[..., Any]) -> Callable[..., Any]:
        return given

    def take_gradients(self, model: Any, optimizer: Any) -> float:
        parts = gradient_parts(model, scale=1.0 / float(optimizer.get_loss_scale()))
        folder = self._folder / f"gradients-{self._batch}"
        save_parts(folder, parts, rank=torch.distributed.get_rank())
        if optimizer.prepare_grads():
            raise ConfigError(
                "the gradients are too large for float16 even at the smallest --loss-scale; check "
                "in float32, the default, or with --check-micro-batches 1"
            )
        self._grad_norm = float(optimizer.get_grad_norm())
        return self._grad_norm

    def end_batch(self, losses: dict[str, Any]) -> None:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            numbers = {name: float(value) for name, value in losses.items()}
            numbers["grad norm"] = self._grad_norm
            write_json(self._folder / f"losses-{self._batch}.json", numbers)
        self._batch += 1
        if self._batch == self._check["num_batches"]:
            torch.distributed.barrier()  # now all ranks have written all
            raise _Done


class ReferenceJob:
    """One rank: compares what it computes with what the layout recorded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._check = read_json(folder / "check.json")
        self._layout = read_json(folder / "layout.json")
        self._step: Any = None
        self._batches: list[dict[str, Any]] = []

    def prepare(self, args: Namespace, parser: argparse.ArgumentParser, *, on_cpu: bool) -> None:
        _prepare_both(args, parser, self._check)
        batch_size = self._layout["global_batch_size"]
        selfcheck_flags.prepare_one_rank(args, parser, global_batch_size=batch_size)

    def finish_args(self, args: Namespace) -> None:
        from megatron_multiturn import megatron_hooks
        from megatron_multiturn.selfcheck_reference import (
            adapt_layer_spec,
            adapt_mtp_spec,
            roll_within_pieces,
        )

        args.piece_multiple = self._layout["piece_multiple"]
        args.calculate_per_token_loss = False
        megatron_hooks.hook_model(adapt_layer_spec, adapt_mtp_spec, roll_within_pieces)

    def begin(self, model: Any, optimizer: Any) -> None:
        from megatron_multiturn.selfcheck_reference import ReferenceStep

        self._step = ReferenceStep(loss_average=self._layout["loss_average"])
        load_parameters(model, optimizer, Recording(self._folder / "initial"))

    def forward_step(self, given: Callable[..., Any]) -> Callable[..., Any]:
        self._step.begin_batch()
        return self._step

    def take_gradients(self, model: Any, optimizer: Any) -> float:
        from megatron_multiturn.selfcheck_reference import compare_gradients

        number = len(self._batches)
        gradients = compare_gradients(
            gradient_parts(model), Recording(self._folder / f"gradients-{number}")
        )
        ours = read_json(self._folder / f"losses-{number}.json")
        theirs = {**self._step.sums.quantities(), "grad norm": gradients["norms"][1]}
        self._batches.append(
            {
                "num_rows": self._step.sums.num_rows,
                "num_turns": self._step.sums.num_turns,
                "num_targets": self._step.sums.num_targets,
                # [in the layout, in the reference], of what both report
                "quantities": {n: [ours[n], theirs[n]] for n in theirs if n in ours},
                "gradients": gradients,
            }
        )
        return float(gradients["norms"][1])

    def end_batch(self, losses: dict[str, Any]) -> None:
        if len(self._batches) == self._check["num_batches"]:
            report = {
                "layout": self._layout,
                "dtype": self._layout["dtype"],
                "weights": Recording(self._folder / "initial").replica_difference(),
                "batches": self._batches,
            }
            write_json(self._folder / "report.json", report)
            raise _Done


JOBS: dict[str, Callable[[Path], Job]] = {"layout": LayoutJob, "reference": ReferenceJob}


def main(argv: list[str] | None = None) -> None:
    """Run one rank of a job; ends the process."""
    role, folder, *arguments = sys.argv[1:] if argv is None else argv
    status = 1
    try:
        run_hooked(JOBS[role](Path(folder)), arguments)
    except _Done:
        status = 0
    except BaseException as error:
        if not isinstance(error, (MultiTurnError, SystemExit)):
            traceback.print_exc()
        _write_failure(Path(folder), role, error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Other ranks may be gone: no process group could be taken down in order.
    os._exit(status)


def _origin_of_weights(args: Namespace) -> str:
    for folder in filter(None, (args.load, args.pretrained_checkpoint)):
        if Path(folder, "latest_checkpointed_iteration.txt").exists():
            return f"with the weights in {folder}"
    return "with freshly initialized weights"


def _prepare_both(
    args: Namespace, parser: argparse.ArgumentParser, check: dict[str, Any]
) -> list[str]:
    return selfcheck_flags.prepare_both(
        args, parser, num_batches=check["num_batches"], dtype=check["dtype"]
    )


def _write_failure(folder: Path, role: str, error: BaseException) -> None:
    kind, message = "error", f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, MultiTurnError):
        kind, message = "user", str(error)
    elif isinstance(error, torch.OutOfMemoryError):
        kind = "memory"
    elif isinstance(error, SystemExit) and error.code == 2:
        kind = "usage"  # Megatron's parser has said why
    rank = int(os.environ.get("RANK", "0"))
    write_json(
        folder / f"failure-{rank}.json",
        {
            "role": role,
            "rank": rank,
            "time": time.time(),
            "kind": kind,
            "message": message,
        },
    )


if __name__ == "__main__":
    main()
