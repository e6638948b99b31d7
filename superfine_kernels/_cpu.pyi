"""
CPU kernels. Addresses are integers from Tensor.data_ptr(); an empty `isa` means the best one.
"""
from __future__ import annotations
import collections.abc
import types
import typing
__all__: list[str] = ['CrossEntropy', 'MomentPlan', 'TensorReader', 'activation', 'adamw', 'adamw_groups', 'add_to_split', 'advise_huge_pages', 'check_labels', 'cross_entropy_backward', 'cross_entropy_forward', 'cross_entropy_part', 'elementwise_loss', 'isas', 'lamb', 'lamb_groups', 'layer_norm', 'layer_norm_gradient', 'round_split', 'sum_of_squares']
class TensorReader:
    """
    Reads torch tensors natively; made once from the torch module.
    """
    def __init__(self, torch: types.ModuleType) -> None:
        ...
    def use_attributes(self) -> None:
        """
        Read through Python attributes from now on.
        """
    @property
    def compares_records(self) -> bool:
        ...
    @property
    def uses_shim(self) -> bool:
        ...
class MomentPlan:
    """
    What a step over groups learned about its tensors, for the next one.
    """
    def __init__(self) -> None:
        ...
class CrossEntropy:
    """
    Logits, targets and settings; see csrc/math/cross_entropy.h. Addresses may be 0 for none.
    """
    def __init__(self, input: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, vocab: typing.SupportsInt | typing.SupportsIndex, row_stride: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, target: typing.SupportsInt | typing.SupportsIndex, target_is_int64: bool, target_stride: typing.SupportsInt | typing.SupportsIndex, targets: typing.SupportsInt | typing.SupportsIndex, probabilities: typing.SupportsInt | typing.SupportsIndex, probabilities_stride: typing.SupportsInt | typing.SupportsIndex, weight: typing.SupportsInt | typing.SupportsIndex, ignore_index: typing.SupportsInt | typing.SupportsIndex, label_smoothing: typing.SupportsFloat | typing.SupportsIndex, z_loss: typing.SupportsFloat | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, scale: typing.SupportsFloat | typing.SupportsIndex, first_class: typing.SupportsInt | typing.SupportsIndex, classes: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
def activation(function: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, columns: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, gate: typing.SupportsInt | typing.SupportsIndex, gate_stride: typing.SupportsInt | typing.SupportsIndex, up: typing.SupportsInt | typing.SupportsIndex, up_stride: typing.SupportsInt | typing.SupportsIndex, grad: typing.SupportsInt | typing.SupportsIndex, grad_stride: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, dup: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> None:
    """
    f(gate) * up to `out`; with `grad` the gradients of gate and up to `out` and `dup`, unless these are 0.
    """
def adamw(reader: TensorReader, lists: collections.abc.Sequence[list], hyper: dict, *, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> list[int]:
    """
    lists: params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps. Returns the positions that it left alone.
    """
def adamw_groups(reader: TensorReader, groups: list, state: dict, plan: MomentPlan, *, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> list[tuple[int, typing.Any]] | None:
    """
    One step over an optimizer's groups, pairs of parameters and hyperparameters. Returns what it left alone: pairs of a group's number and a parameter. None, and nothing done, where a parameter is a tensor subclass or lies elsewhere.
    """
def add_to_split(high: typing.SupportsInt | typing.SupportsIndex, low: typing.SupportsInt | typing.SupportsIndex, x: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> None:
    """
    Adds `count` bf16 numbers to fp32 ones, whose halves are `high` and `low`.
    """
def advise_huge_pages(address: typing.SupportsInt | typing.SupportsIndex, bytes: typing.SupportsInt | typing.SupportsIndex) -> bool:
    """
    Asks for huge pages behind a fresh buffer. False where the system has none.
    """
def check_labels(args: CrossEntropy) -> tuple[int, float]:
    """
    (place among rows x targets of the first label outside [0, classes) or -1, what a mean divides by).
    """
def cross_entropy_backward(args: CrossEntropy, sums: typing.SupportsInt | typing.SupportsIndex, scale: typing.SupportsInt | typing.SupportsIndex, scale_stride: typing.SupportsInt | typing.SupportsIndex, dlogits: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> None:
    """
    dlogits, which may be the input, from lse and mass of all classes and one scale a row.
    """
def cross_entropy_forward(args: CrossEntropy, out: typing.SupportsInt | typing.SupportsIndex, statistics: bool, dlogits: typing.SupportsInt | typing.SupportsIndex, scale: typing.SupportsFloat | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> float:
    """
    Results of every row to `out`; with `dlogits` also scale * dloss/dinput. Returns the sum of the losses.
    """
def cross_entropy_part(args: CrossEntropy, out: typing.SupportsInt | typing.SupportsIndex, statistics: bool, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> None:
    """
    What a part of the classes adds to the results of every row, to `out`.
    """
def elementwise_loss(loss: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, input: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, target: typing.SupportsInt | typing.SupportsIndex, target_dtype: typing.SupportsInt | typing.SupportsIndex, weight: typing.SupportsInt | typing.SupportsIndex, weight_length: typing.SupportsInt | typing.SupportsIndex, weight_repeat: typing.SupportsInt | typing.SupportsIndex, pos_weight: typing.SupportsInt | typing.SupportsIndex, pos_weight_length: typing.SupportsInt | typing.SupportsIndex, pos_weight_repeat: typing.SupportsInt | typing.SupportsIndex, scale: typing.SupportsInt | typing.SupportsIndex, scale_stride: typing.SupportsInt | typing.SupportsIndex, denominator: typing.SupportsFloat | typing.SupportsIndex, losses: typing.SupportsInt | typing.SupportsIndex, gradient: typing.SupportsInt | typing.SupportsIndex, sum: bool, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> float:
    """
    Unless the addresses are 0, the losses of all elements, and what the gradient is: scale[i * scale_stride] / denominator * dloss_i/dinput_i. Returns the sum of the losses if that is asked for.
    """
def isas() -> list[str]:
    """
    The instruction sets that this build holds and this processor runs, best last.
    """
def lamb(reader: TensorReader, lists: collections.abc.Sequence[list], hyper: dict, *, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> list[int]:
    """
    lists: params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps. Returns the positions that it left alone.
    """
def lamb_groups(reader: TensorReader, groups: list, state: dict, plan: MomentPlan, *, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> list[tuple[int, typing.Any]] | None:
    """
    One step over an optimizer's groups, pairs of parameters and hyperparameters. Returns what it left alone: pairs of a group's number and a parameter. None, and nothing done, where a parameter is a tensor subclass or lies elsewhere.
    """
def layer_norm(rms: bool, rows: typing.SupportsInt | typing.SupportsIndex, size: typing.SupportsInt | typing.SupportsIndex, eps: typing.SupportsFloat | typing.SupportsIndex, weight_offset: typing.SupportsFloat | typing.SupportsIndex, cast_before_weight: bool, input: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, residual: typing.SupportsInt | typing.SupportsIndex, weight: typing.SupportsInt | typing.SupportsIndex, weight_dtype: typing.SupportsInt | typing.SupportsIndex, bias: typing.SupportsInt | typing.SupportsIndex, bias_dtype: typing.SupportsInt | typing.SupportsIndex, sum: typing.SupportsInt | typing.SupportsIndex, output: typing.SupportsInt | typing.SupportsIndex, output_dtype: typing.SupportsInt | typing.SupportsIndex, mean: typing.SupportsInt | typing.SupportsIndex, rstd: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> None:
    """
    Rows normalised, and unless their addresses are 0 the sum of input and residual, mean and rstd of every row; see csrc/math/layer_norm.h.
    """
def layer_norm_gradient(rms: bool, rows: typing.SupportsInt | typing.SupportsIndex, size: typing.SupportsInt | typing.SupportsIndex, weight_offset: typing.SupportsFloat | typing.SupportsIndex, grad: typing.SupportsInt | typing.SupportsIndex, grad_dtype: typing.SupportsInt | typing.SupportsIndex, grad_sum: typing.SupportsInt | typing.SupportsIndex, input: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, weight: typing.SupportsInt | typing.SupportsIndex, weight_dtype: typing.SupportsInt | typing.SupportsIndex, mean: typing.SupportsInt | typing.SupportsIndex, rstd: typing.SupportsInt | typing.SupportsIndex, dinput: typing.SupportsInt | typing.SupportsIndex, dweight: typing.SupportsInt | typing.SupportsIndex, dbias: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> None:
    """
    Unless their addresses are 0, the gradients of input, weight and bias.
    """
def round_split(high: typing.SupportsInt | typing.SupportsIndex, low: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> None:
    """
    Rounds the fp32 numbers of `high` and `low` to bf16, in `high`.
    """
def sum_of_squares(reader: TensorReader, tensors: list, *, threads: typing.SupportsInt | typing.SupportsIndex, isa: str) -> float | None:
    """
    Of all elements of all tensors; None where one of them is not dense on the CPU, or has no kernel.
    """
__version__: str = '0.1.0'
