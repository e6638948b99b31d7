"""The CUDA module as built: machine code without spills, and a clear answer on machines without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

SPEC = importlib.util.find_spec("superfine_kernels._cuda")

pytestmark = pytest.mark.skipif(SPEC is None, reason="built without CUDA kernels")


@pytest.fixture(scope="module")
def usages():
    from superfine_bench.binaries import cuobjdump, resource_usage

    if cuobjdump() is None:
        pytest.skip("no cuobjdump to read the machine code with; Triton ships one")
    return {f"{arch} {name}": usage for (arch, name), usage in resource_usage(SPEC.origin).items()}


def of_kernel(usages, name):
    found = {full: usage for full, usage in usages.items() if name in full}
    assert found, f"no machine code of {name}"
    return found


def test_no_kernel_spills_on_any_architecture(usages):
    spilling = {name: usage for name, usage in usages.items() if usage.stack}
    assert not spilling


def test_every_architecture_has_every_kernel(usages):
    by_architecture: dict[str, int] = {}
    for name in usages:
        architecture = name.split()[0]
        by_architecture[architecture] = by_architecture.get(architecture, 0) + 1
    assert len(set(by_architecture.values())) == 1, by_architecture
    # Seven pairs of dtypes and 8-bit moments; fp64, 8-bit moments and all other pairs.
    assert len(of_kernel(usages, "adamw_kernel")) == 8 * len(by_architecture)
    assert len(of_kernel(usages, "lamb_moments_kernel")) == 3 * len(by_architecture)
    assert len(of_kernel(usages, "lamb_param_kernel")) == 3 * len(by_architecture)
    assert len(of_kernel(usages, "count_kernel")) == len(by_architecture)
    # Three dtypes with the row held or not; four of everything else.
    assert len(of_kernel(usages, "plain_kernel")) == 3 * 2 * len(by_architecture)
    assert len(of_kernel(usages, "general_kernel")) == 4 * len(by_architecture)
    assert len(of_kernel(usages, "elementwise_loss_kernel")) == len(by_architecture)


def test_blocks_fit_into_a_multiprocessor(usages):
    registers = 65536
    for name, usage in of_kernel(usages, "adamw_kernel").items():
        assert usage.registers * 256 * 4 <= registers, name  # four blocks hide each other's latency
    for kernel in ("lamb_moments_kernel", "lamb_param_kernel"):
        for name, usage in of_kernel(usages, kernel).items():
            assert usage.registers * 128 * 4 <= registers, name  # what each holds is in csrc/cuda/lamb.cu
    for name, usage in of_kernel(usages, "elementwise_loss_kernel").items():
        blocks = 6 if name.startswith("sm_120") else 8  # as many threads as a multiprocessor takes
        assert usage.registers * 256 * blocks <= registers, name
    for kernel in ("plain_kernel", "general_kernel"):
        for name, usage in of_kernel(usages, kernel).items():
            threads = 512 if f"{kernel}Id" in name else 1024  # mangled: the first template argument is double
            assert usage.registers * threads <= registers, name
            # Less than kStaticShared of csrc/cuda/cross_entropy.cu, and 1 KB that the system takes from sm_90 on; the
            # row has the rest.
            assert usage.shared <= 2048 + (1024 if int(name.split()[0].removeprefix("sm_")) >= 90 else 0), (
                name
            )


def run(code: str) -> str:
    """Runs Python in a process that sees no GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_without_a_gpu_and_says_why_it_cannot_run():
    output = run(
        "from superfine_kernels import _cuda\n"
        "print(_cuda.device_count())\n"
        "print(type(_cuda.why_unavailable()).__name__, _cuda.why_unavailable())\n"
    )
    count, reason = output.splitlines()
    assert count == "0"
    assert reason.startswith("str ")
    assert "driver" in reason or "GPU" in reason


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("cross_entropy_forward", "(rows, **gradient, out=0, statistics=False, **where)"),
        ("cross_entropy_backward", "(rows, **gradient, sums=0, **where)"),
        ("cross_entropy_part", "(rows, out=0, statistics=False, **where)"),
        ("cross_entropy_denominator", "(rows, out=0, **where)"),
        ("cross_entropy_reduce", "(losses=0, rows=1, dtype=0, denominator=0, out=0, **where)"),
    ],
)
def test_a_call_without_a_gpu_is_an_error_that_names_the_op(op, call):
    output = run(
        "from superfine_kernels import _cuda\n"
        "import torch\n"
        "from superfine_kernels._losses import Options, Rows\n"
        "rows = Rows(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), None, None, Options())\n"
        "rows = _cuda.CrossEntropy(**rows.native())\n"
        "gradient = dict(dlogits=0, scale=0, scale_stride=0)\n"
        "where = dict(stream=0, device=0)\n"
        f"try:\n    _cuda.{op}{call}\nexcept RuntimeError as error:\n    print(error)\n"
    )
    assert output.startswith(f"{op}: ")
    assert "driver" in output or "GPU" in output


def test_elementwise_losses_without_a_gpu_are_an_error_that_names_the_op():
    output = run(
        "from superfine_kernels import _cuda\n"
        "from superfine_kernels._elements import Elements, Pattern\n"
        "import torch\n"
        "x = torch.zeros(3)\n"
        "arguments = Elements('mse', x, x, Pattern(None, 1), Pattern(None, 1)).native()\n"
        "rest = dict(scale=0, scale_stride=0, denominator=1.0, losses=0, gradient=0, sums=0, out=0)\n"
        "try:\n    _cuda.elementwise_loss(**arguments, **rest, stream=0, device=0)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    assert output.startswith("elementwise_loss: ")
    assert "driver" in output or "GPU" in output


def test_adamw_takes_cuda_tensors_only():
    output = run(
        "import torch\n"
        "from superfine_kernels import _cuda\n"
        "from superfine_kernels._library import READER\n"
        "lists = [[torch.zeros(3)] for _ in range(4)] + [[], [], [], []] + [[torch.zeros(())]]\n"
        "hyper = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True,\n"
        "             gradient_scale=1.0, zero_grads=False, stochastic_rounding=False, seed=0)\n"
        "try:\n    _cuda.adamw(READER, lists, hyper, allocate=int, stream=0)\n"
        "except ValueError as error:\n    print(error)\n"
        "print(_cuda.adamw(READER, [[]] * 9, hyper, allocate=int, stream=0))\n"
    )
    error, nothing_left = output.splitlines()
    assert error.startswith("adamw_: params[0] is float32 ")
    assert error.endswith(" on cpu; expected a tensor on cuda:0")
    assert nothing_left == "[]"


def test_groups_on_the_cpu_are_left_to_others():
    output = run(
        "import torch\n"
        "from superfine_kernels import _cuda\n"
        "from superfine_kernels._library import READER\n"
        "from superfine_kernels._moments import Plan\n"
        "param = torch.nn.Parameter(torch.ones(3))\n"
        "param.grad = torch.ones(3)\n"
        "state = {param: dict(step=torch.zeros(()), exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))}\n"
        "hyper = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, gradient_scale=1.0,\n"
        "             zero_grads=False, stochastic_rounding=False, seed=0, amsgrad=False, anchored=False)\n"
        "adamw, lamb = dict(hyper, decoupled=True), dict(\n"
        "    hyper, bias_correction=True, grad_averaging=True, adapt=True, trust_clip=False)\n"
        "for step, hyper in ((_cuda.adamw_groups, adamw), (_cuda.lamb_groups, lamb)):\n"
        "    print(step(READER, [([param], hyper)], state, Plan(), allocate=int, stream=0))\n"
        "    print(step(READER, [([], hyper)], {}, Plan(), allocate=int, stream=0))\n"
        "print(state[param]['step'].item(), param.sum().item())\n"
    )
    assert output.splitlines() == ["None", "[]", "None", "[]", "0.0 3.0"]
