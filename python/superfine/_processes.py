"""What lets several processes train a model, and what trains in it, have to agree.

DistributedDataParallel averages the gradients of those parameters that required one when it was made; of others each
process keeps its own, and the models drift apart without an error. fully_shard replaces parameters by parts of them.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from superfine._guard import Flags
from superfine_kernels._sharded import is_sharded

__all__ = ["check_reduced", "refuse_sharded"]

# The flags with which a wrapper has been compared.
_compared: WeakKeyDictionary[nn.Module, Flags] = WeakKeyDictionary()


def check_reduced(flags: Flags) -> None:
    """In a forward under `DistributedDataParallel`: `ValueError` where it averages other gradients than train."""
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or _compared.get(wrapper) is flags:
        return
    trains = {
        id(parameter): parameter
        for name, parameter in wrapper.module.named_parameters()
        if parameter.requires_grad and name not in wrapper.parameters_to_ignore
    }.values()
    # The only word of it that the wrapper gives: numbers of tensors and bytes.
    stated = wrapper._get_ddp_logging_data()
    size = sum(parameter.numel() * parameter.element_size() for parameter in trains)
    if stated.get("num_parameter_tensors", len(trains)) != len(trains) or (
        stated.get("total_parameter_size_bytes", size) != size
    ):
        raise ValueError(
            "forward: DistributedDataParallel averages the gradients of "
            f"{stated['num_parameter_tensors']} parameters ({stated['total_parameter_size_bytes']} bytes), and "
            f"{len(trains)} train ({size} bytes); expected the model to be wrapped after superfine.select and "
            "superfine.prepare"
        )
    _compared[wrapper] = flags


def refuse_sharded(op: str, model: nn.Module) -> None:
    """`ValueError` for a model of whose parameters each process holds a part."""
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{op}: {name!r} is a DTensor, of which each process holds a part; expected the model as it is "
                "before fully_shard, or one that was loaded with what torch.distributed.checkpoint gathers"
            )
