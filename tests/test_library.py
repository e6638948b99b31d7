"""What the ops share: error texts, the backend table, tensors that a kernel may read."""

from __future__ import annotations

import importlib

import pytest
import torch
from support import ISAS, one_warning, run_python
from torch._subclasses.fake_tensor import FakeTensorMode

import superfine_kernels
from superfine_kernels import _backends, _library
from superfine_kernels._moments import LISTS


def test_describe_names_dtype_shape_and_device():
    assert _library.describe(torch.zeros(4, 5, dtype=torch.float16)) == "float16 (4, 5) on cpu"
    assert _library.describe(torch.tensor(1, device="meta")) == "int64 () on meta"
    assert _library.describe(1.5) == "1.5 (float)"
    assert _library.describe("a") == "'a' (str)"


def test_reject_says_what_is_and_what_was_expected():
    with pytest.raises(TypeError, match=r"^op: x is 3 \(int\); expected a tensor$"):
        _library.reject("op", "x", 3, "a tensor", TypeError)
    with pytest.raises(ValueError, match=r"^op: x is float32 \(2,\) on cpu; expected float64$"):
        _library.reject("op", "x", torch.zeros(2), "float64")


def test_each_warning_is_given_once():
    with one_warning("slow"):
        for _ in range(3):
            _library.warn_once("slow")
    with one_warning("slower"):
        _library.warn_once("slower")


def test_opmath_is_float64_for_float64_alone():
    assert [_library.opmath_dtype(dtype) for dtype in _library.DTYPE_CODES] == [
        torch.float32, torch.float32, torch.float32, torch.float64
    ]  # fmt: skip


class _Subclass(torch.Tensor):
    pass


def test_kernels_read_only_tensors_that_hold_their_values_themselves():
    plain = torch.zeros(2)
    assert _library.is_plain([plain, torch.nn.Parameter(plain)])
    assert not _library.is_plain([plain, plain.as_subclass(_Subclass)])
    with FakeTensorMode():
        assert not _library.is_plain([plain])

    def inside(x: torch.Tensor) -> torch.Tensor:
        assert not _library.is_plain([x])
        return x

    torch.func.vmap(inside)(torch.zeros(2, 2))
    assert _library.is_plain([plain])


def test_instruction_sets_are_listed_best_last():
    assert ISAS[0] == "baseline"
    assert list(dict.fromkeys(ISAS)) == ISAS
    assert set(ISAS) <= {"baseline", "avx2", "avx512"}
    assert superfine_kernels.isa() == ISAS[-1]


def test_the_table_says_what_is_usable_and_why_not():
    table = superfine_kernels.backends().splitlines()
    assert table[0].split() == ["device", "backend", "usable", "here"]
    rows = {tuple(line.split()[:2]): line for line in table[1:]}
    assert list(rows) == [(device, name) for device, names in _backends.TABLE.items() for name in names]
    assert rows["cpu", "cpu"].endswith(f"yes ({ISAS[-1]})")
    reason = _backends.why_unavailable("cuda")
    assert rows["cuda", "cuda"].endswith("yes" if reason is None else f"no: {reason}")


def test_the_first_usable_backend_is_chosen():
    assert _backends.choose("op", torch.device("cpu")) == "cpu"
    assert _backends.choose("op", torch.device("meta")) == "reference"
    assert _backends.choose("op", torch.device("cpu"), "reference") == "reference"
    for isa in ISAS:
        assert _backends.choose("op", torch.device("cpu"), f"cpu:{isa}") == f"cpu:{isa}"


@pytest.mark.parametrize(
    ("backend", "device", "reason"),
    [
        ("mps", "cpu", "no such backend"),
        ("cpu:neon", "cpu", "this processor or build has baseline"),
        ("cpu", "cuda", "it does not serve tensors on cuda"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_the_reason(backend, device, reason):
    with pytest.raises(ValueError) as error:
        _backends.choose("op", torch.device(device), backend)
    assert str(error.value).startswith(f"op: backend is {backend!r}; expected one that is usable here: ")
    assert reason in str(error.value)


def test_ops_are_registered_under_one_namespace_with_their_mutations():
    for name in ("activation", "elementwise_loss", "layer_norm"):  # imported when asked for
        importlib.import_module(f"superfine_kernels.{name}")
    schemas = {
        name: getattr(torch.ops.superfine, name).default._schema
        for name in (
            "adamw_",
            "lamb_",
            "activation",
            "activation_backward",
            "cross_entropy",
            "cross_entropy_",
            "cross_entropy_backward",
            "elementwise_loss",
            "elementwise_loss_",
            "elementwise_loss_backward",
            "layer_norm",
            "layer_norm_backward",
        )
    }
    written = {name: [a.name for a in s.arguments if a.is_write] for name, s in schemas.items()}
    written_lists = [name for name in LISTS if name != "anchors"]
    assert written == {
        "adamw_": written_lists,
        "lamb_": written_lists,
        "activation": [],
        "activation_backward": [],
        "cross_entropy": [],
        "cross_entropy_": ["input"],
        "cross_entropy_backward": [],
        "elementwise_loss": [],
        "elementwise_loss_": ["input"],
        "elementwise_loss_backward": [],
        "layer_norm": [],
        "layer_norm_backward": [],
    }


def test_imports_within_inference_mode():
    printed = run_python("""
import torch
with torch.inference_mode():
    import superfine_kernels
from superfine_kernels._library import READER
print(READER.uses_shim, READER.compares_records)
""")
    assert printed.split() == ["True", "True"]
