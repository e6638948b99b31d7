"""The dry run: every GPU kernel and what it uses, without a GPU; and what is read from machine code."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
from types import SimpleNamespace

import pytest
import superfine_bench
from rich.console import Console
from superfine_bench import aot, binaries, dry_run
from superfine_bench.binaries import Usage, demangle, occupancy, short_name
from superfine_bench.dry_run import KernelRow, print_dry_run


def printed(rows):
    text = io.StringIO()
    print_dry_run(Console(width=140, file=text), rows)
    return text.getvalue()


def by_backend(rows, backend):
    return [row for row in rows if row.backend == backend]


@pytest.mark.slow
def test_lists_every_kernel_of_both_backends_and_no_kernel_spills():
    pytest.importorskip("triton")
    rows = dry_run.dry_run(["sm_90"], 3350.0)
    triton = by_backend(rows, "triton")
    assert {(row.op, row.kernel) for row in triton} >= {
        ("activation", "_activation"),
        ("adamw", "_adamw"),
        ("cross_entropy", "_forward"),
        ("cross_entropy", "_backward"),
        ("elementwise_loss", "_elementwise_loss"),
    }
    # Whether Triton's kernels spill is the matter of test_triton_aot.py, which knows what may.
    assert [row for row in by_backend(rows, "cuda") if row.stack] == []
    assert all(row.arch == "sm_90" for row in rows)
    assert all(row.registers > 0 for row in rows if not row.note)
    notes = [row.note for row in rows if row.note]
    if not notes:  # CUDA kernels were built, or could be compiled
        assert {(row.op, row.kernel) for row in by_backend(rows, "cuda")} >= {
            ("adamw", "adamw_kernel"),
            ("cross_entropy", "plain_kernel"),
            ("cross_entropy", "general_kernel"),
            ("elementwise_loss", "elementwise_loss_kernel"),
        }
    case = superfine_bench.all_cases("adamw")[0]
    row = next(row for row in rows if row.op == "adamw")
    assert row.least_ms[f"{case.name}, {case.dtype}"] == pytest.approx(case.cost().bytes / 3350e9 * 1e3)


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(dry_run, "_triton", lambda arch: [])


def without_module(monkeypatch):
    monkeypatch.setattr(dry_run.importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_triton")
def test_compiles_the_sources_where_the_module_was_not_built(monkeypatch):
    monkeypatch.setattr(dry_run, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(dry_run, "toolkit_program", lambda name: "nvcc")
    without_module(monkeypatch)
    commands = []

    def compiled(command, **options):
        commands.append(command)

    monkeypatch.setattr(dry_run.subprocess, "run", compiled)
    monkeypatch.setattr(
        dry_run, "resource_usage", lambda binary: {("sm_80", "_Z6kernelIfEvT_"): Usage(32, 0, 128)}
    )
    rows = dry_run.dry_run(["sm_80"])
    assert [row.op for row in rows] == [path.stem for path in sorted((dry_run.SOURCES / "cuda").glob("*.cu"))]
    first = rows[0]
    assert (first.kernel, first.variant, first.registers, first.shared) == ("kernel", "float", 32, 128)
    assert first.least_ms == {}  # no bandwidth was given
    assert "-arch=sm_80" in commands[0]
    assert "-fmad=false" in commands[0]  # as in CMakeLists.txt: it changes the machine code


@pytest.mark.usefixtures("without_triton")
def test_says_why_there_are_no_cuda_rows(monkeypatch):
    without_module(monkeypatch)
    monkeypatch.setattr(dry_run, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(dry_run, "toolkit_program", lambda name: None)
    (row,) = dry_run.dry_run(["sm_80"])
    assert row.note == "not read: the CUDA module was not built, and nvcc is missing"
    assert row.registers is None
    monkeypatch.setattr(dry_run, "cuobjdump", lambda: None)
    (row,) = dry_run.dry_run(["sm_80"])
    assert "cuobjdump is missing" in row.note
    assert "cuda, sm_80: not read: cuobjdump is missing" in printed([row])


@pytest.mark.usefixtures("without_triton")
def test_a_source_that_does_not_compile_is_named_with_the_compilers_reason(monkeypatch):
    def fails(command, **options):
        stderr = "a.h(1): warning #177: declared but never referenced\na.cu(2): error: expected a ;\nmore\n"
        raise subprocess.CalledProcessError(1, command, stderr=stderr)

    without_module(monkeypatch)
    monkeypatch.setattr(dry_run, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(dry_run, "toolkit_program", lambda name: "nvcc")
    monkeypatch.setattr(dry_run.subprocess, "run", fails)
    rows = dry_run.dry_run(["sm_80"])
    assert "adamw.cu does not compile: a.cu(2): error: expected a ;" in [row.note for row in rows]


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("failed with error code 255\nstderr:\nline 5; error   : bad\nmore", "line 5; error   : bad"),
        ("name 'x' is not defined\nsecond\n", "name 'x' is not defined"),
        ("\n", "no output"),
    ],
)  # fmt: skip
def test_the_line_of_a_compilers_output_that_names_the_error(output, line):
    assert binaries.first_error(output) == line


def test_a_triton_kernel_that_does_not_compile_is_named_and_the_others_are_listed(monkeypatch):
    pytest.importorskip("triton")
    kernel = aot.TritonKernel("adamw", "_adamw", "sm_90", {}, {}, [], 4, 32, 0, 0, "")
    lines = [json.dumps(dataclasses.asdict(kernel)), '{"op": "lamb", "kernel": "_lamb", "reason": "no"}']
    ran = subprocess.CompletedProcess([], 0, stdout="\n".join(lines), stderr="")
    monkeypatch.setattr(aot.subprocess, "run", lambda *arguments, **options: ran)
    monkeypatch.setattr(dry_run, "_cuda", lambda arch: [])
    rows = dry_run.dry_run(["sm_90"])
    assert [(row.kernel, row.registers, row.note) for row in rows] == [
        ("_adamw", 32, ""),
        ("_lamb", None, "lamb: _lamb does not compile: no"),
    ]
    assert "triton, sm_90: lamb: _lamb does not compile: no" in printed(rows)
    with pytest.raises(RuntimeError, match="lamb: _lamb: no"):
        aot.compile_triton("sm_90")


def test_a_kernel_that_triton_refuses_leaves_the_others_compiled(monkeypatch, capsys):
    pytest.importorskip("triton")
    from triton.runtime import JITFunction

    def launch(self, *arguments, **options):
        if self.fn.__name__ == "bad":
            raise RuntimeError("ptxas failed with error code 255\nline 5; error : too many\n")
        return SimpleNamespace(hash=self.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(aot, "_described", lambda op, arch, kernel: aot.Uncompiled(op, kernel.hash, "fine"))
    functions = [SimpleNamespace(fn=SimpleNamespace(__name__=name)) for name in ("bad", "good")]

    def call(kernels):
        for function in functions:
            JITFunction.run(function, grid=None, warmup=False)

    monkeypatch.setitem(aot.CALLS, "adamw", call)
    aot._main("sm_90", "adamw")
    assert [json.loads(line)["reason"] for line in capsys.readouterr().out.splitlines()] == [
        "fine",
        "line 5; error : too many",
    ]
    assert JITFunction.run is launch


def test_without_triton_its_kernels_are_missing_with_the_reason(monkeypatch):
    monkeypatch.setattr(dry_run, "_cuda", lambda arch: [])
    without_module(monkeypatch)
    (row,) = dry_run.dry_run(["sm_90"])
    assert (row.backend, row.note) == ("triton", "not compiled: triton is not installed")


def test_prints_variants_together_and_names_the_one_that_spills():
    shared = {"op": "adamw", "kernel": "step", "backend": "cuda", "arch": "sm_90", "least_ms": {"7B": 1.25}}
    text = printed(
        [
            KernelRow(variant="float", registers=40, stack=0, shared=0, **shared),
            KernelRow(variant="double", registers=64, stack=24, shared=512, **shared),
        ]
    )
    assert "40-64" in text
    assert "0-512" in text
    assert "step double (cuda, sm_90) spills 24 bytes a thread" in text
    assert "1.25" in text


@pytest.mark.parametrize(
    ("archs", "bandwidth", "message"),
    [
        (["sm_90", "h100"], None, r"arch is 'h100'; expected one of sm_80"),
        (["sm_70"], None, r"arch is 'sm_70'; expected one of sm_80"),
        (["sm_90"], 0.0, r"dry_run: bandwidth_gb_s is 0.0; expected a number above 0"),
        (["sm_90"], float("nan"), r"bandwidth_gb_s is nan"),
    ],
)
def test_a_bad_argument_is_an_error_before_anything_is_compiled(archs, bandwidth, message, monkeypatch):
    monkeypatch.setattr(dry_run, "_cuda", lambda arch: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=message):
        dry_run.dry_run(archs, bandwidth)


# --- machine code ------------------------------------------------------------------------------------------


def test_reads_what_cuobjdump_prints(monkeypatch):
    report = (
        "Fatbin elf code:\n================\narch = sm_90\ncode version = [1,8]\n\n"
        "Resource usage:\n Common:\n  GLOBAL:0\n Function _Z6kernelIfEvT_:\n"
        "  REG:40 STACK:8 SHARED:1280 LOCAL:16 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    monkeypatch.setattr(binaries.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=report))
    monkeypatch.setattr(binaries, "cuobjdump", lambda: "cuobjdump")
    assert binaries.resource_usage("any.so") == {("sm_90", "_Z6kernelIfEvT_"): Usage(40, 24, 1280)}


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_ZN2at4fillIfLi4EEEvT_", "fill<float, 4>"),
        ("void at::native::fill<4, at::native::Functor<float> >(int, float)", "fill<4, Functor<float>>"),
        ("void ours::(anonymous namespace)::step<ours::Table<float, 48> >(ours::Table<float, 48>)",
         "step<Table<float, 48>>"),
        ("void at::apply<at::fill(int)::lambda>(int)", "apply<fill(int)::lambda>"),
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0"),
        ("Memset (Device)", "Memset"),
    ],
)  # fmt: skip
def test_a_kernels_name_is_shortened_to_what_tells_it_apart(name, short):
    assert short_name(name) == short


def test_demangling_leaves_other_names_alone():
    assert demangle("_forward") == "_forward"
    assert demangle("_Z1fv") == "f()"


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "threads", "expected"),
    [
        (90, 32, 0, 256, 1.0),
        (90, 40, 0, 256, 0.75),  # 6 blocks of 8 warps: 1280 registers a warp, 48 warps in all
        (90, 255, 0, 256, 0.125),  # one block: 8 warps of 8192 registers
        (90, 32, 100 * 1024, 256, 0.25),  # two blocks of 101 KiB in 228 KiB
        (80, 32, 0, 32, 0.5),  # 32 blocks of one warp at most
        (86, 32, 0, 1024, 32 / 48),
        (90, 72, 0, 1024, 0.0),  # 72 * 1024 registers are more than there are
    ],
)
def test_occupancy_is_bounded_by_warps_registers_shared_memory_or_blocks(
    capability, registers, shared, threads, expected
):
    assert occupancy(capability, registers, shared, threads) == pytest.approx(expected)
