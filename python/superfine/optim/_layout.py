"""How a parameter's optimizer state is stored: dtypes, hidden bits, 8-bit codes; makes and converts it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from superfine_kernels import _storage
from superfine_kernels._library import describe, in_huge_pages, reject
from superfine_kernels._sharded import is_sharded

_HALVES = (torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_CODES = ("exp_avg", "exp_avg_sq", "scales")  # of 8-bit moments


def _zeros(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the parameter's shape and strides; in huge pages, which make steps over large matrices 2% faster."""
    made = torch.empty_like(param, dtype=dtype, requires_grad=False)
    return (in_huge_pages(made) if type(made) is Tensor else made).zero_()


def counts(values: Sequence[float | Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters' counts of steps: on a GPU for those that lie there, else on the CPU.

    Those on a device are views of one buffer, so that a step finds them side by side.
    """
    places: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        places.setdefault(param.device if param.is_cuda else torch.device("cpu"), []).append(i)
    found: dict[int, Tensor] = {}
    for device, positions in places.items():
        chosen = [values[i] for i in positions]
        if any(isinstance(value, Tensor) for value in chosen):
            buffer = torch.stack(
                [torch.as_tensor(value, dtype=torch.float32, device=device).reshape(()) for value in chosen]
            )
        else:
            buffer = torch.tensor(chosen, dtype=torch.float32, device=device)
        found.update({i: buffer[k] for k, i in enumerate(positions)})
    return [found[i] for i in range(len(params))]


@dataclass(frozen=True)
class Layout:
    """The state of one parameter.

    Attributes:
        moments: their dtype; uint8 for codes with scales.
        remainder: dtype of what rounding takes from the parameter; None: that is lost.
        amsgrad: whether there are maxima of the second moments.
    """

    moments: torch.dtype
    remainder: torch.dtype | None
    amsgrad: bool

    @classmethod
    def of(
        cls,
        op: str,
        param: Tensor,
        master_weights: str | None,
        state_dtype: torch.dtype | None,
        amsgrad: bool,
    ) -> Self:
        """That of `param` in an optimizer with these options; ValueError where they do not go together."""
        remainder = None
        if master_weights == "split" and param.dtype == torch.bfloat16:
            remainder = torch.int16
        elif master_weights == "kahan" and param.dtype in _HALVES:
            remainder = param.dtype
        default = torch.float32 if remainder == torch.int16 else param.dtype
        wanted = state_dtype or default
        halves = param.dtype in _HALVES
        if wanted != param.dtype and not (
            (wanted == torch.float32 and halves)
            or (wanted == torch.bfloat16 and param.dtype == torch.float32)
            or (wanted == torch.uint8 and (halves or param.dtype == torch.float32))
        ):
            reject(op, "state_dtype", wanted, f"None beside {param.dtype} parameters")
        if wanted == torch.uint8 and amsgrad:
            reject(op, "state_dtype", wanted, "None beside amsgrad, whose maxima have no 8-bit form")
        if wanted == torch.uint8 and is_sharded(param):
            reject(
                op, "state_dtype", wanted, "16 or 32 bits for DTensors, as blocks do not end where parts do"
            )
        return cls(wanted, remainder, amsgrad)

    def new(self, param: Tensor, step: Tensor) -> dict[str, Tensor]:
        """State before the first step, which `step` counts from."""
        state = {"step": step}
        for name in _MOMENTS[: 3 if self.amsgrad else 2]:
            state[name] = _zeros(param, self.moments)
        if self.moments == torch.uint8:
            state["scales"] = torch.zeros(_storage.scales_shape(param.numel()), device=param.device)
        if self.remainder is not None:
            state["remainder"] = _zeros(param, self.remainder)
        return state

    def convert(self, param: Tensor, saved: Mapping[str, Any], state: dict[str, Any]) -> dict[str, Tensor]:
        """The entries of `saved` state in this layout; removes from `state` what the layout does not have."""
        moments = {name: saved[name].to(param.device) for name in (*_MOMENTS, "scales") if name in saved}
        if "scales" in moments:
            if self.moments != torch.uint8:
                m, v = _storage.dequantize(*(moments[name] for name in _CODES))
                moments = {"exp_avg": m, "exp_avg_sq": v}
        elif self.moments == torch.uint8 and moments:
            codes = _storage.quantize(*(moments[name].float() for name in _MOMENTS[:2]))
            moments = dict(zip(_CODES, codes, strict=True))
        found = {
            name: t.to(dtype=torch.float32 if name == "scales" else self.moments, copy=True)
            for name, t in moments.items()
        }
        if self.remainder is not None:
            low = saved.get("remainder")
            if low is not None and low.dtype == self.remainder:  # torch's optimizers convert them
                found["remainder"] = low.to(device=param.device, copy=True)
            else:
                found["remainder"] = _zeros(param, self.remainder)
        for name in {"scales", "remainder"} - found.keys():
            state.pop(name, None)
        return found


def check_saved(states: Iterable[Mapping[str, Any]]) -> None:
    """ValueError for 8-bit moments in a checkpoint, or scales, that another optimizer has converted."""
    for saved in states:
        for name, dtype in zip(_CODES, (torch.uint8, torch.uint8, torch.float32), strict=True):
            if "scales" in saved and (name not in saved or saved[name].dtype != dtype):
                found = describe(saved[name]) if name in saved else "missing"
                raise ValueError(
                    f"load_state_dict: {name} is {found} beside scales of 8-bit moments; expected "
                    f"{dtype}. Another optimizer has converted it; load the checkpoint that was saved by Superfine's"
                )
