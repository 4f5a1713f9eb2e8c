"""The patches of Megatron that training needs, each with the reason why there is no other way.

They replace functions in Megatron's modules for the rest of the process. Only the runner and the
selfcheck call them.
"""

import argparse
import functools
import importlib
import inspect
import os
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatron_multiturn import megatron_compat
from megatron_multiturn.errors import ConfigError

ArgsHook = Callable[[argparse.Namespace], None]
ParserHook = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

_originals: dict[str, Any] = {}  # Megatron's own, of what `hook_model` has patched


def skip_needless_compilation() -> None:
    """Let `pretrain` start where the dataset helpers are compiled and cannot be built.

    The wheel brings the compiled helpers and no Makefile; `compile_helpers` would end the
    process. It is replaced only then: a checkout goes on building its own.
    """
    from megatron.core.datasets import utils

    if os.path.exists(os.path.join(os.path.dirname(utils.__file__), "Makefile")):
        return
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError as error:
        raise ConfigError(
            f"Megatron's dataset helpers are not compiled ({error}), and the installed Megatron "
            "has no Makefile to build them; install the megatron-core wheel for this Python, or "
            "run with the pretrain_gpt.py of a checkout"
        ) from error
    utils.compile_helpers = lambda: None


def hook_arguments(add_args: ParserHook, prepare: ArgsHook) -> None:
    """Let Megatron's parser know our flags, and `prepare` see the arguments before validation.

    Patches `parse_args` and `validate_args` of `megatron.training.arguments`: scripts parse by
    functions of that module which offer a caller no other way in, and before 0.18 Megatron by its
    own names for them. In between Megatron may take over arguments of a checkpoint. A YAML
    configuration is validated elsewhere, so `prepare` sees it at once.
    """
    from megatron.training import arguments, initialize

    parse_args, validate_args = arguments.parse_args, arguments.validate_args

    @functools.wraps(parse_args)
    def parse_args_with_ours(
        extra_args_provider: ParserHook | None = None, *args: Any, **kwargs: Any
    ) -> argparse.Namespace:
        def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = add_args(parser)
            parser.error = _refuse_arguments  # type: ignore[method-assign]
            return extra_args_provider(parser) if extra_args_provider else parser

        parsed = parse_args(provider, *args, **kwargs)
        if parsed.yaml_cfg is not None:
            prepare(parsed)
        return parsed

    @functools.wraps(validate_args)
    def validate_prepared_args(parsed: argparse.Namespace, *args: Any, **kwargs: Any) -> Any:
        prepare(parsed)
        return validate_args(parsed, *args, **kwargs)

    for module in (arguments, initialize):
        if hasattr(module, "parse_args"):
            module.parse_args, module.validate_args = parse_args_with_ours, validate_prepared_args


def _refuse_arguments(message: str) -> NoReturn:
    """In place of argparse's, which prints some 700 lines of usage on every rank."""
    raise ConfigError(message)


def hook_pretrain(replacements: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Hand `pretrain` our arguments by parameter name, whatever its signature in this version.

    replacements: called with Megatron's arguments when the script calls `pretrain`; the values
        take the place of the script's.
    """
    from megatron import training

    pretrain = training.pretrain

    @functools.wraps(pretrain)
    def pretrain_with_ours(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(pretrain).bind(*args, **kwargs)
        args_of_script = bound.arguments.get("extra_args_provider")
        bound.arguments.update(replacements(megatron_compat.parsed_args(args_of_script)))
        return pretrain(*bound.args, **bound.kwargs)

    training.pretrain = training.training.pretrain = pretrain_with_ours


def hook_initialization(then: Callable[[], None]) -> None:
    """Call `then` as soon as `pretrain` has made the process groups and the tokenizer.

    Patches `pretrain`'s own name for the function that makes them: nothing of a script's comes
    between that and the model.
    """
    from megatron import training

    initialize = training.training.initialize_megatron

    @functools.wraps(initialize)
    def initialize_and_look(*args: Any, **kwargs: Any) -> Any:
        result = initialize(*args, **kwargs)
        then()
        return result

    training.training.initialize_megatron = initialize_and_look


def hook_checkpoint_arguments(look: ArgsHook) -> None:
    """Let `look` see the arguments kept in the checkpoint that a run goes on from.

    Patches where Megatron compares them with its own, which it does not with --finetune: it keeps
    nothing of them but how many rows were consumed.
    """
    from megatron.training import checkpointing

    check = checkpointing.check_checkpoint_args

    @functools.wraps(check)
    def look_and_check(checkpoint_args: argparse.Namespace, *args: Any, **kwargs: Any) -> Any:
        look(checkpoint_args)
        return check(checkpoint_args, *args, **kwargs)

    checkpointing.check_checkpoint_args = look_and_check


def hook_model(
    adapt_spec: Callable[[Any, Any, int | None], Any],
    adapt_mtp_spec: Callable[[Any, Any], None],
    roll: Callable[..., Any],
) -> None:
    """Let the GPT that Megatron builds keep the pieces of a row apart.

    adapt_spec: returns the spec to build its layers by; called with Megatron's, the model's
        `TransformerConfig` and the virtual pipeline stage.
    adapt_mtp_spec: changes the spec of its multi-token prediction layers in place; called with it
        and the configuration.
    roll: takes the place of Megatron's shift by one position, called with a tensor and the
        `packed_seq_params` of a forward step, where these are ours (`piece_boundaries`).

    Patches the model's constructor, which takes the specs in every version and from any script,
    and the shift, whose own version for packed rows takes one row and synchronizes once a piece.
    A later call takes the place of an earlier one.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import multi_token_prediction

    build = _originals.setdefault("GPTModel", GPTModel.__init__)
    roll_tensor = _originals.setdefault("roll_tensor", multi_token_prediction.roll_tensor)

    @functools.wraps(build)
    def build_adapted(model: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(build).bind(model, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        config = given["config"]
        given["transformer_layer_spec"] = adapt_spec(
            given["transformer_layer_spec"], config, given["vp_stage"]
        )
        if given["mtp_block_spec"] is not None:
            adapt_mtp_spec(given["mtp_block_spec"], config)
        build(*bound.args, **bound.kwargs)

    @functools.wraps(roll_tensor)
    def roll_packed(
        tensor: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        if tensor is not None and hasattr(packed_seq_params, "piece_boundaries"):
            return roll(tensor, packed_seq_params)
        return roll_tensor(tensor, *args, packed_seq_params=packed_seq_params, **kwargs)

    GPTModel.__init__ = build_adapted
    multi_token_prediction.roll_tensor = roll_packed


def compile_rotary_embedding() -> None:
    """Let PyTorch fuse the rotary embedding where Transformer Engine's kernel does not do it.

    Megatron's own version is a dozen kernels a tensor, a seventh of a step of a 1.3B model. It is
    compiled in its place by what Megatron compiles its other fusions with.
    """
    from megatron.core import jit
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_bshd = jit.jit_fuser(rope_utils._apply_rotary_pos_emb_bshd)


def fuse_gradient_accumulation() -> None:
    """Let `--gradient-accumulation-fusion` work without the kernels of NVIDIA's Apex.

    With it, a weight's gradient is added to that of earlier micro-batches by the product that
    computes it. PyTorch's matrix product takes over where Megatron would call Apex's.
    """
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def add_weight_gradient(inputs: Tensor, output_gradient: Tensor, main_grad: Tensor) -> None:
    """Add `output_gradient.T @ inputs` to `main_grad`, in place and in its precision.

    Shapes (tokens, in), (tokens, out) and (out, in).
    """
    mixed: Any = {} if main_grad.dtype == inputs.dtype else {"out_dtype": main_grad.dtype}
    torch.addmm(main_grad, output_gradient.t(), inputs, out=main_grad, **mixed)


def hook_log_lines(counts: Sequence[str], epoch_of: Callable[[int], float | None]) -> None:
    """Put right what Megatron's log makes of values that are no losses.

    counts: their perplexities are left out of the line on an evaluation.
    epoch_of: how many epochs a number of rows are; `epoch` in the line on training is that of the
        line's step, where Megatron gives a mean over the steps since the last line.

    Patches how the lines are printed: Megatron takes every reported value for a loss.
    """
    from megatron import training

    print_rank_last = training.training.print_rank_last
    perplexity = re.compile(rf" (?:{'|'.join(map(re.escape, counts))}) PPL: \S+ \|")

    @functools.wraps(print_rank_last)
    def print_corrected(message: str) -> None:
        message = perplexity.sub("", message)
        consumed = re.search(r" consumed samples: +(\d+) \|", message)
        epoch = epoch_of(int(consumed.group(1))) if consumed else None
        if epoch is not None:
            message = re.sub(r" epoch: \S+ \|", f" epoch: {epoch:.6g} |", message)
        print_rank_last(message)

    training.training.print_rank_last = print_corrected
