"""Adapters for the libraries that Superfine is compared with, where they are installed.

A peer gets the same tensors and the same check as everyone: who is wrong, crashes or cannot run here has a row that
says so. Nothing in this file is imported by the ops themselves, and no peer is needed to run the benchmarks.
"""

from __future__ import annotations

import importlib
import importlib.util
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from .harness import UnavailableError

Call = TypeVar("Call", bound=Callable[[], Any])


@dataclass(frozen=True)
class Peer:
    """A function or class of another library that does a case's work.

    Attributes:
        name: as shown in tables.
        package: the distribution.
        module: where ``attribute`` is imported from, when a case that uses it is built.
        attribute: the function or class.
        options: arguments that make its work equal to everyone's.
        devices: what it runs on.
        moments: an optimizer's names for the two moments in its state.
        state: what else has to be in the state of a parameter that already made steps.
        start: brings an optimizer to another step, which it returns, where that is not a matter of its state.
        fp32_moments: its kernel takes moments in fp32 only, whatever the parameters are.
        in_quick: False leaves it out of quick runs.
        install: how to get it, where pip alone does not do.
    """

    name: str
    package: str
    module: str
    attribute: str
    options: dict[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cuda",)
    moments: tuple[str, str] = ("exp_avg", "exp_avg_sq")
    state: dict[str, Any] = field(default_factory=dict)
    start: Callable[[Any], int] | None = None
    fp32_moments: bool = False
    in_quick: bool = True
    install: str = ""

    def load(self, device: torch.device) -> Callable[..., Any]:
        """Import it, or raise :class:`UnavailableError` with the reason."""
        if device.type not in self.devices:
            raise UnavailableError(f"{self.package} has no {device.type} kernel for this")
        module = require(self.module, self.package, self.install)
        return partial(getattr(module, self.attribute), **self.options)


def _past_bias_correction(optimizer: Any) -> int:
    """Go to a step where bias correction is 1: optimi corrects what it stores, everyone else what they read."""
    optimizer.step()  # makes the counter
    optimizer.param_groups[0]["step"].fill_(100_000)
    return 100_000


#: One AdamW step on moments that are given, in the dtype of the parameters.
ADAMW = (
    Peer(
        "optimi",
        "torch-optimi",
        "optimi",
        "AdamW",
        options={"kahan_sum": False},  # on by default for bf16: a third state
        devices=("cpu", "cuda"),
        state={"kahan_comp": None},  # without this entry it makes its moments anew
        start=_past_bias_correction,
    ),
    Peer(
        "bitsandbytes 32-bit",
        "bitsandbytes",
        "bitsandbytes.optim",
        "AdamW32bit",
        devices=("cpu", "cuda"),
        moments=("state1", "state2"),
        fp32_moments=True,
        in_quick=False,  # compiles on the CPU
    ),
    Peer("DeepSpeed FusedAdam", "deepspeed", "deepspeed.ops.adam", "FusedAdam", in_quick=False),  # compiles
    Peer(
        "DeepSpeed CPUAdam",
        "deepspeed",
        "deepspeed.ops.adam",
        "DeepSpeedCPUAdam",
        devices=("cpu",),
        fp32_moments=True,
        in_quick=False,  # compiles
    ),
    Peer(
        "apex FusedAdam",
        "apex",
        "apex.optimizers",
        "FusedAdam",
        fp32_moments=True,
        install="build it from github.com/NVIDIA/apex with --cuda_ext",  # PyPI's apex is another project
    ),
)

#: One AdamW step that keeps its moments in 8 bits, in blocks of its own choice.
ADAMW_8BIT = (
    Peer("torchao 8-bit", "torchao", "torchao.optim", "AdamW8bit", devices=("cpu", "cuda"), in_quick=False),
    Peer(
        "bitsandbytes 8-bit",
        "bitsandbytes",
        "bitsandbytes.optim",
        "AdamW8bit",
        devices=("cpu", "cuda"),
        in_quick=False,
    ),
)

#: ``(logits, target) -> mean loss`` with a gradient.
CROSS_ENTROPY = (
    Peer("Liger", "liger-kernel", "liger_kernel.transformers.functional", "liger_cross_entropy"),
    Peer("QuACK", "quack-kernels", "quack.cross_entropy", "cross_entropy", options={"reduction": "mean"}),
    Peer(
        "QuACK, in place",
        "quack-kernels",
        "quack.cross_entropy",
        "cross_entropy",
        options={"reduction": "mean", "inplace_backward": True},
    ),
)


def require(module: str, package: str, install: str = "") -> Any:
    """Import ``module`` of the distribution ``package``.

    Raises:
        UnavailableError: it is not installed, with how to get it, or its own imports fail.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            how = install or f"pip install --no-deps {package}"
            raise UnavailableError(f"{package} is not installed: {how}") from error
        raise UnavailableError(f"{package} cannot be imported here: {error}") from error


def compiled(call: Call) -> Call:
    """Return ``call``, run once so that ``torch.compile`` is done with it.

    Raises:
        UnavailableError: it cannot be compiled here, for want of a C++ compiler for instance.
    """
    try:
        call()
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnavailableError(f"torch.compile: {first_line[:160]}") from error
    return call


def install_line() -> str:
    """The shell line that installs every peer that PyPI has, with PEFT for the LoRA steps.

    Most peers require torch, and pip would be free to replace the one that is installed by a release or a build that
    fits them better. So they come without their requirements, and what they need besides follows by name.
    """
    peers = [peer.package for peer in (*ADAMW, *ADAMW_8BIT, *CROSS_ENTROPY) if not peer.install]
    without_torch = [*dict.fromkeys(peers), "peft", "accelerate", "torch-c-dlpack-ext"]
    besides = ["einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo", "nvidia-cutlass-dsl"]
    besides.append("apache-tvm-ffi>=0.1.6,<0.2")
    return f"pip install --no-deps {shlex.join(without_torch)} && pip install {shlex.join(besides)}"
