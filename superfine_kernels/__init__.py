"""Superfine's ops on tensors: functions without modules or state, one file per op.

    adamw_(params, grads, ...)      one multi-tensor AdamW step            superfine_kernels/adamw.py
    lamb_(params, grads, ...)       one multi-tensor LAMB step             superfine_kernels/lamb.py
    cross_entropy(input, target)    loss and gradient of the logits        superfine_kernels/cross_entropy.py
    linear_cross_entropy(...)       the same behind a linear layer         superfine_kernels/linear_cross_entropy.py
    topk_kl_div(...)                distillation, and linear_topk_kl_div   superfine_kernels/distillation.py
    vocab_parallel_*(...)           both, classes on several processes     superfine_kernels/vocab_parallel.py
    rows_linear, rows_embedding, cols_linear   a part of a weight trains   superfine_kernels/slices.py
    lora_linear(input, weight, ...) a linear layer with its LoRA adapter   superfine_kernels/lora_linear.py
    bce_with_logits(input, target)  binary cross-entropy                   superfine_kernels/elementwise_loss.py
    mse(input, target)              mean squared error                     superfine_kernels/elementwise_loss.py
    layer_norm(input, weight)       layer norm of rows, and rms_norm       superfine_kernels/layer_norm.py
    gelu(input), silu(input)        activations                            superfine_kernels/activation.py
    swiglu(gate, up), geglu(...)    gated linear units                     superfine_kernels/activation.py

`backends()` shows which implementation serves which device here.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# torch comes first: it starts the OpenMP runtime that the CPU kernels then share. With the kernels
# first, a second runtime would start and every call would pay for the fight over the cores.
import torch  # noqa: F401  isort: skip

from superfine_kernels._backends import backends, isa
from superfine_kernels._head import LoRA, TrainableRows
from superfine_kernels._library import Cost, __version__
from superfine_kernels._losses import CrossEntropyStats
from superfine_kernels.adamw import adamw_, adamw_groups_
from superfine_kernels.cross_entropy import cross_entropy
from superfine_kernels.lamb import lamb_, lamb_groups_
from superfine_kernels.norm import total_norm

if TYPE_CHECKING:  # a checker would take the submodules of these names for them
    from superfine_kernels.layer_norm import layer_norm, rms_norm
    from superfine_kernels.linear_cross_entropy import linear_cross_entropy
    from superfine_kernels.lora_linear import lora_linear

__all__ = [
    "Cost",
    "CrossEntropyStats",
    "LoRA",
    "TrainableRows",
    "__version__",
    "adamw_",
    "adamw_groups_",
    "backends",
    "bce_with_logits",
    "cols_linear",
    "cross_entropy",
    "geglu",
    "gelu",
    "isa",
    "lamb_",
    "lamb_groups_",
    "layer_norm",
    "linear_cross_entropy",
    "linear_topk_kl_div",
    "lora_linear",
    "mse",
    "rms_norm",
    "rows_embedding",
    "rows_linear",
    "silu",
    "swiglu",
    "topk_kl_div",
    "total_norm",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]

_WHEN_ASKED_FOR = {
    "bce_with_logits": "elementwise_loss",
    "cols_linear": "slices",
    "geglu": "activation",
    "gelu": "activation",
    "layer_norm": "layer_norm",
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_topk_kl_div": "distillation",
    "lora_linear": "lora_linear",
    "mse": "elementwise_loss",
    "rms_norm": "layer_norm",
    "rows_embedding": "slices",
    "rows_linear": "slices",
    "silu": "activation",
    "swiglu": "activation",
    "topk_kl_div": "distillation",
    "vocab_parallel_cross_entropy": "vocab_parallel",
    "vocab_parallel_linear_cross_entropy": "vocab_parallel",
}


def __getattr__(name: str) -> Any:
    """What few programs use is imported when they do."""
    if name not in _WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_WHEN_ASKED_FOR[name]}"), name)
    return value


class _Package(ModuleType):
    """Where an op and its file have one name, the op has it here, whoever has imported the file, and when."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _WHEN_ASKED_FOR:  # set by the import of a submodule
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
