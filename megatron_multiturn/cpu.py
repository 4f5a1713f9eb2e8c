"""Real Megatron on the CPU: a stand-in for `torch.cuda` on a machine without a GPU.

Megatron names the device "cuda" in some hundreds of places. `install()` maps that device to
the CPU and gives `torch.cuda` the answers of one idle device, so that the same command runs
its real model, process groups (gloo) and pipeline schedules. It is for tests, demos and dry
runs of a cluster job. It changes the process for good: only the runner calls it.
"""

import contextlib
import os
import sys
import time
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    f"torch.{name}Tensor": f"torch.cuda.{name}Tensor" for name in ("Float", "Half", "BFloat16")
}


# Megatron prefers these to PyTorch wherever they can be imported; all of them need a GPU.
_ACCELERATORS = ("transformer_engine", "apex", "amp_C", "flash_attn")


def is_needed() -> bool:
    """Whether this machine has no GPU, so that the stand-in is the only way to run."""
    return not torch.cuda.is_available()


def install() -> None:
    """Map "cuda" to the CPU for the rest of this process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists, with TP
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling for minutes would gain nothing
    for name in _ACCELERATORS:
        sys.modules[name] = None  # type: ignore[assignment]  # its import then fails
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _answer_as_one_device()
    _replace_streams_and_events()
    _replace_random_state()
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    # DataLoader asks this before it starts a thread that pins memory.
    torch.accelerator.is_available = lambda: False
    _CudaToCpu().__enter__()


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


class _CudaToCpu(TorchFunctionMode):
    """Rewrites the device of every torch call from "cuda" to "cpu"."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.distributed.all_to_all_single:
            # Megatron makes lists of the sizes when it copies them from the device to the host.
            kwargs = {name: _as_list(value) for name, value in kwargs.items()}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type:
            # Megatron compares these names with "torch.cuda.FloatTensor" and its like.
            if len(args) == 1 and not kwargs:
                name = func(*args)
                return _CUDA_TYPE_NAMES.get(name, name)
            if isinstance(args[1], str):
                args = (args[0], args[1].replace("torch.cuda.", "torch."), *args[2:])
        return func(*args, **kwargs)


class _Stream:
    """A stream on which everything has already happened."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        event = event or _Event()
        event.record()
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class _Event:
    """An event that keeps the wall clock, so that `elapsed_time` is true."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return (end._seconds - self._seconds) * 1e3


class _OneGenerator:
    """`torch.cuda.default_generators`, with one generator for every device."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def __getitem__(self, device: int) -> torch.Generator:
        return self._generator


def _answer_as_one_device() -> None:
    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(
        name="cpu", major=8, minor=0, multi_processor_count=1, total_memory=1 << 34
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": _CPU,
        "get_device_capability": (8, 0),
        "get_device_properties": properties,
        "get_device_name": "cpu",
        "is_current_stream_capturing": False,
        "memory_stats": {},
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "_lazy_init",
    ):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    for name in ("Long", "Int", "Byte", "Float", "Double", "Half", "BFloat16"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


def _replace_streams_and_events() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.set_stream = lambda stream: None
    cuda.stream = cuda.device = lambda target: contextlib.nullcontext()


def _replace_random_state() -> None:
    cuda: Any = torch.cuda
    generators = _OneGenerator()
    generator = generators[0]
    cuda.default_generators = generators
    cuda.manual_seed = generator.manual_seed
    # The CPU's own seed comes by torch.manual_seed; there is no second device to seed.
    cuda.manual_seed_all = lambda seed: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: (
        generator.set_state(state)
    )
    cuda.get_rng_state_all = list
