"""The stations of a Megatron training run at which a selfcheck steps in."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_multiturn.__main__ import run
from megatron_multiturn.errors import ConfigError

Namespace = argparse.Namespace


class Job(Protocol):
    """What is done at the stations of a training run."""

    def prepare(self, args: Namespace, parser: argparse.ArgumentParser, *, on_cpu: bool) -> None:
        """Before Megatron validates the flags, and before the plugin looks at them."""

    def finish_args(self, args: Namespace) -> None:
        """When they are validated."""

    def begin(self, model: Any, optimizer: Any) -> None:
        """When the model is built."""

    def forward_step(self, given: Callable[..., Any]) -> Callable[..., Any]:
        """At the beginning of a batch; returns the forward step to take for it."""

    def take_gradients(self, model: Any, optimizer: Any) -> float:
        """In place of the optimizer's step; returns the norm of the gradient."""

    def end_batch(self, losses: dict[str, Any]) -> None:
        """When Megatron has its losses for the log (empty but on the last pipeline stage)."""


def run_hooked(job: Job, arguments: Sequence[str]) -> None:
    """Run Megatron's training as the runner does, with `job` at its stations.

    arguments: as of `python -m megatron_multiturn`. Ends by what the job raises; raises
    ConfigError if the training ends before.
    """

    def hook(on_cpu: bool) -> None:
        _hook_flags(job, on_cpu=on_cpu)
        _hook_training(job)

    run(list(arguments), after_hooks=hook)
    raise ConfigError(
        "the training ended before the batches that were asked for; the script must call "
        "Megatron's pretrain, with training to be done"
    )


def _hook_flags(job: Job, *, on_cpu: bool) -> None:
    """Let the job see Megatron's parser and, before and after validation, the flags.

    Outside of what the runner has hooked: `prepare` comes before the plugin's own look.
    """
    from megatron.training import arguments

    from megatron_multiturn import megatron_hooks

    parsers: list[argparse.ArgumentParser] = []

    def keep_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(parser)
        return parser

    def prepare(args: Namespace) -> None:
        job.prepare(args, parsers[-1], on_cpu=on_cpu)

    megatron_hooks.hook_arguments(keep_parser, prepare)
    validate_args = arguments.validate_args

    def validate_and_finish(parsed: Namespace, *args: Any, **kwargs: Any) -> Any:
        result = validate_args(parsed, *args, **kwargs)
        job.finish_args(parsed)
        return result

    arguments.validate_args = validate_and_finish


def _hook_training(job: Job) -> None:
    from megatron.training import training

    setup, train_step = training.setup_model_and_optimizer, training.train_step

    def setup_and_begin(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = setup(*args, **kwargs)
        optimizer.step = lambda: (True, job.take_gradients(model, optimizer), None)
        job.begin(model, optimizer)
        return model, optimizer, scheduler

    def checked_train_step(forward_step_func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = train_step(job.forward_step(forward_step_func), *args, **kwargs)
        job.end_batch(result[0])
        return result

    training.setup_model_and_optimizer = setup_and_begin
    training.train_step = checked_train_step
