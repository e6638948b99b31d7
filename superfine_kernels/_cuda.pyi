"""
CUDA kernels. Addresses are integers from Tensor.data_ptr(), `stream` is a cudaStream_t as integer.
"""
from __future__ import annotations
import collections.abc
import superfine_kernels._cpu
import typing
__all__: list[str] = ['CrossEntropy', 'ELEMENTS_PER_SUM', 'MOST_ELEMENTS', 'adamw', 'adamw_groups', 'cross_entropy_backward', 'cross_entropy_denominator', 'cross_entropy_forward', 'cross_entropy_part', 'cross_entropy_reduce', 'device_count', 'elementwise_loss', 'lamb', 'lamb_groups', 'runtime_version', 'why_unavailable']
class CrossEntropy:
    """
    Logits, targets and settings; see csrc/math/cross_entropy.h. Addresses may be 0 for none.
    """
    def __init__(self, input: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, vocab: typing.SupportsInt | typing.SupportsIndex, row_stride: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, target: typing.SupportsInt | typing.SupportsIndex, target_is_int64: bool, target_stride: typing.SupportsInt | typing.SupportsIndex, targets: typing.SupportsInt | typing.SupportsIndex, probabilities: typing.SupportsInt | typing.SupportsIndex, probabilities_stride: typing.SupportsInt | typing.SupportsIndex, weight: typing.SupportsInt | typing.SupportsIndex, ignore_index: typing.SupportsInt | typing.SupportsIndex, label_smoothing: typing.SupportsFloat | typing.SupportsIndex, z_loss: typing.SupportsFloat | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, scale: typing.SupportsFloat | typing.SupportsIndex, first_class: typing.SupportsInt | typing.SupportsIndex, classes: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
def adamw(reader: superfine_kernels._cpu.TensorReader, lists: collections.abc.Sequence[list], hyper: dict, *, allocate: collections.abc.Callable, stream: typing.SupportsInt | typing.SupportsIndex) -> list[int]:
    """
    lists: params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps. lr, beta1, beta2 and gradient_scale may be tensors of one element on the device, float32 or float64, which the kernels read; where such a gradient_scale is not finite, the step is not taken, but gradients are zeroed if that is asked for. `allocate` takes bytes and returns the address of that much memory on the device, which stays until the stream is done with it. Returns the positions that were left alone.
    """
def adamw_groups(reader: superfine_kernels._cpu.TensorReader, groups: list, state: dict, plan: superfine_kernels._cpu.MomentPlan, *, allocate: collections.abc.Callable, stream: typing.SupportsInt | typing.SupportsIndex) -> list[tuple[int, typing.Any]] | None:
    """
    One step over an optimizer's groups, pairs of parameters and hyperparameters, which are as those of lists. Returns what it left alone: pairs of a group's number and a parameter. None, and nothing done, where a parameter is a tensor subclass or does not lie on the one device.
    """
def cross_entropy_backward(args: CrossEntropy, sums: typing.SupportsInt | typing.SupportsIndex, scale: typing.SupportsInt | typing.SupportsIndex, scale_stride: typing.SupportsInt | typing.SupportsIndex, dlogits: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    dlogits from `sums`, the lse and mass of rows with all their classes, and one scale, or one scale a row.
    """
def cross_entropy_denominator(args: CrossEntropy, out: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    out[0] = sum of the weights of the labels that are not ignored (their number without weights), or the number of rows that count where there are probabilities; out[1] = 1 / out[0].
    """
def cross_entropy_forward(args: CrossEntropy, out: typing.SupportsInt | typing.SupportsIndex, statistics: bool, dlogits: typing.SupportsInt | typing.SupportsIndex, scale: typing.SupportsInt | typing.SupportsIndex, scale_stride: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    RowResult of every row, 3 x rows, or 6 x rows with statistics; unless `dlogits` is 0 also scale[i * scale_stride] * dloss_i/dinput_i.
    """
def cross_entropy_part(args: CrossEntropy, out: typing.SupportsInt | typing.SupportsIndex, statistics: bool, stream: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    PartResult of every row, 4 x rows, or 7 x rows with statistics.
    """
def cross_entropy_reduce(losses: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, denominator: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    out[0] = sum of the losses, divided by denominator[0] unless that address is 0.
    """
def device_count() -> int:
    """
    The number of GPUs; 0 without a driver.
    """
def elementwise_loss(loss: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, input: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, target: typing.SupportsInt | typing.SupportsIndex, target_dtype: typing.SupportsInt | typing.SupportsIndex, weight: typing.SupportsInt | typing.SupportsIndex, weight_length: typing.SupportsInt | typing.SupportsIndex, weight_repeat: typing.SupportsInt | typing.SupportsIndex, pos_weight: typing.SupportsInt | typing.SupportsIndex, pos_weight_length: typing.SupportsInt | typing.SupportsIndex, pos_weight_repeat: typing.SupportsInt | typing.SupportsIndex, scale: typing.SupportsInt | typing.SupportsIndex, scale_stride: typing.SupportsInt | typing.SupportsIndex, denominator: typing.SupportsFloat | typing.SupportsIndex, losses: typing.SupportsInt | typing.SupportsIndex, gradient: typing.SupportsInt | typing.SupportsIndex, sums: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Unless the addresses are 0: the losses of all elements; scale[i * scale_stride] / denominator * dloss_i/dinput_i as gradient; in out[0] the sum of the losses over the denominator, for which `sums` holds a float32 for every ELEMENTS_PER_SUM elements. Takes 1 to MOST_ELEMENTS elements, not of float64.
    """
def lamb(reader: superfine_kernels._cpu.TensorReader, lists: collections.abc.Sequence[list], hyper: dict, *, allocate: collections.abc.Callable, stream: typing.SupportsInt | typing.SupportsIndex) -> list[int]:
    """
    lists: params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps. lr, beta1, beta2 and gradient_scale may be tensors of one element on the device, float32 or float64, which the kernels read; where such a gradient_scale is not finite, the step is not taken, but gradients are zeroed if that is asked for. `allocate` takes bytes and returns the address of that much memory on the device, which stays until the stream is done with it. Returns the positions that were left alone.
    """
def lamb_groups(reader: superfine_kernels._cpu.TensorReader, groups: list, state: dict, plan: superfine_kernels._cpu.MomentPlan, *, allocate: collections.abc.Callable, stream: typing.SupportsInt | typing.SupportsIndex) -> list[tuple[int, typing.Any]] | None:
    """
    One step over an optimizer's groups, pairs of parameters and hyperparameters, which are as those of lists. Returns what it left alone: pairs of a group's number and a parameter. None, and nothing done, where a parameter is a tensor subclass or does not lie on the one device.
    """
def why_unavailable() -> str | None:
    """
    Why no kernel can run on this machine, or None where one can.
    """
ELEMENTS_PER_SUM: int = 8192
MOST_ELEMENTS: int = 1073741824
__version__: str = '0.1.0'
runtime_version: int = 13000
