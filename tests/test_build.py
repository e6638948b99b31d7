"""What the build made: objects that cannot leak instructions, stubs that fit the module, versions that agree."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import superfine_kernels
from superfine_kernels import _cpu
from superfine_kernels._losses import Options, Rows

ROOT = Path(__file__).resolve().parent.parent

OBJECTS = sorted(
    path
    for folder in ROOT.glob("build/*/CMakeFiles")
    for path in folder.glob("sf_cpu_*.dir/**/*.o")
    if (folder.parent / "build.ninja").is_file()
)

needs_objects = pytest.mark.skipif(
    not OBJECTS or shutil.which("nm") is None, reason="needs the objects of an in-tree build, and nm"
)


def symbols(path: Path) -> list[tuple[str, str]]:
    """(type, demangled name) of every symbol of an object file."""
    printed = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    return [(line[17], line[19:]) for line in printed.splitlines()]


@needs_objects
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: f"{path.parents[3].name}-{path.name}")
def test_no_symbol_of_an_isa_object_can_be_merged_with_anothers(path):
    # The linker keeps one copy of a weak symbol. Were that the AVX-512 one, older processors would run it.
    # (The pointer to the runtime's exception handler is data, and one for all.)
    weak = {name for kind, name in symbols(path) if kind in "WwVvu"} - {"DW.ref.__gxx_personality_v0"}
    assert weak == set()


@needs_objects
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: f"{path.parents[3].name}-{path.name}")
def test_an_isa_object_defines_its_own_namespace_only(path):
    isa = re.search(r"sf_cpu_(\w+)\.dir", str(path))[1]
    defined = [name for kind, name in symbols(path) if kind in "TDB"]
    assert defined
    assert [name for name in defined if not name.startswith(f"superfine::cpu::{isa}::")] == []


@needs_objects
def test_every_isa_holds_every_op():
    held = {(re.search(r"sf_cpu_(\w+)\.dir", str(p))[1], p.name) for p in OBJECTS}
    isas, ops = {isa for isa, _ in held}, {op for _, op in held}
    assert held == {(isa, op) for isa in isas for op in ops}
    assert {"adamw.cpp.o", "cross_entropy.cpp.o"} <= ops
    assert set(_cpu.isas()) <= isas


def stub() -> ast.Module:
    path = ROOT / "superfine_kernels" / "_cpu.pyi"
    if not path.is_file():
        pytest.skip("stubs have not been generated here")
    return ast.parse(path.read_text())


def test_the_stubs_list_what_the_module_offers():
    tree = stub()
    listed = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    offered = {name for name in dir(_cpu) if not name.startswith("__") and name != "_pybind11_conduit_v1_"}
    assert {name for name in listed if not name.startswith("_")} == offered


@pytest.mark.parametrize("name", ["TensorReader"])
def test_the_stubs_list_the_members_of_the_classes(name):
    tree = stub()
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    listed = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
    offered = {member for member in vars(getattr(_cpu, name)) if not member.startswith("_")}
    assert offered <= listed


def test_functions_take_their_arguments_by_the_names_of_the_stubs():
    tree = stub()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            signature = getattr(_cpu, node.name).__doc__.splitlines()[0]
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                assert re.search(rf"\b{argument.arg}\b", signature), f"{node.name}: {argument.arg}"


def test_module_package_and_distribution_have_one_version():
    assert superfine_kernels.__version__ == _cpu.__version__ == importlib.metadata.version("superfine")
    assert (
        re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1] == _cpu.__version__
    )


def test_the_module_has_no_torch_in_it():
    if shutil.which("ldd") is None:
        pytest.skip("needs ldd")
    linked = subprocess.run(["ldd", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch" not in linked
    assert "libc10" not in linked


def test_an_unknown_instruction_set_is_refused_by_the_module_itself():
    arguments = _cpu.CrossEntropy(
        **Rows(torch.ones(0, 3), torch.ones(0).long(), None, None, Options()).native()
    )
    with pytest.raises(ValueError, match="isa is 'mmx'; expected one that this processor has"):
        _cpu.cross_entropy_backward(
            arguments, sums=0, scale=0, scale_stride=0, dlogits=0, threads=1, isa="mmx"
        )
