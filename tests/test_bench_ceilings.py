"""superfine_bench.ceilings: every stream at every size that fits, products, the empty call; nothing left changed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from superfine import env
from superfine_bench import ceilings
from superfine_bench.records import Ceilings

CPU = torch.device("cpu")
SECONDS = 0.05  # every stream and product is measured at least once however short the time


@pytest.fixture
def small_sets(monkeypatch):
    """Two sets, of 1 and 4 MiB, whatever cache this machine has."""
    monkeypatch.setattr(ceilings, "LARGEST_SET", 2**22)
    monkeypatch.setattr(env, "last_level_cache", lambda device: None)


def test_measures_every_stream_at_every_size_products_and_the_empty_call(small_sets):
    said = []
    measured = ceilings.measure_ceilings(CPU, SECONDS, said.append)
    assert measured.device == "cpu"
    assert set(measured.rates) == {"copy", "read", "write", "4r3w"}
    for sizes in measured.rates.values():
        assert [size for size, _ in sizes] == [2**20, 2**22]
        assert all(rate > 0 and math.isfinite(rate) for _, rate in sizes)
    assert set(measured.gemm) <= {"float32", "bfloat16"}
    assert measured.gemm["float32"] > 0
    assert measured.launch_us > 0
    assert said == ["memory streams", "float32 matrix products", "bfloat16 matrix products", "an empty call"]


def test_one_stream_can_be_measured_alone(small_sets):
    measured = ceilings.measure_ceilings(CPU, SECONDS, only="4r3w")
    assert set(measured.rates) == {"4r3w"}
    assert measured.gemm == {}
    assert measured.launch_us is None


def test_a_stream_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"only is '3r2w'; expected one of copy, read, write, 4r3w"):
        ceilings.measure_ceilings(CPU, SECONDS, only="3r2w")


def test_a_set_larger_than_a_quarter_of_the_free_memory_is_skipped(small_sets, monkeypatch):
    monkeypatch.setattr(env, "available_memory", lambda: 5 * 2**20)
    assert [size for size, _ in ceilings.measure_ceilings(CPU, SECONDS, only="copy").rates["copy"]] == [2**20]


def test_a_set_that_cannot_be_allocated_is_skipped(small_sets, monkeypatch):
    allocate = torch.ones

    def refuse_large(count, **options):
        if count * 4 >= 2**22:
            raise torch.OutOfMemoryError("out of memory")
        return allocate(count, **options)

    monkeypatch.setattr(ceilings.torch, "ones", refuse_large)
    sizes = [size for size, _ in ceilings.measure_ceilings(CPU, SECONDS, only="copy").rates["copy"]]
    assert sizes == [2**21]


def test_without_memory_for_any_set_there_are_no_rates(small_sets, monkeypatch):
    monkeypatch.setattr(env, "available_memory", lambda: 2**20)
    assert ceilings.measure_ceilings(CPU, SECONDS, only="read").rates == {}


def test_the_largest_set_is_beyond_the_last_level_cache(small_sets, monkeypatch):
    monkeypatch.setattr(env, "last_level_cache", lambda device: 3 * 2**20)
    rates = ceilings.measure_ceilings(CPU, SECONDS, only="write").rates
    assert [size for size, _ in rates["write"]] == [2**21, 2**23]


def test_an_implementation_that_does_not_run_is_left_to_the_others(small_sets, monkeypatch):
    from superfine_kernels import adamw

    def unavailable(*args, **kwargs):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(adamw, "adamw_", unavailable)
    assert len(ceilings.measure_ceilings(CPU, SECONDS, only="4r3w").rates["4r3w"]) == 2


def test_streams_keep_memory_finite_and_away_from_denormals():
    memory = torch.ones(2**18)
    with ceilings.ThreadPoolExecutor(1) as pool:
        streams = ceilings._streams(memory, pool)
        for _ in range(3):
            for stream in streams:
                stream.call()
                assert bool(((memory == 0) | (memory == 1)).all()), stream
    assert {stream.traffic for stream in streams} == set(ceilings.TRAFFICS)


def test_a_traffic_is_the_best_of_its_implementations(monkeypatch):
    seconds = {"slow": 2.0, "fast": 1.0}
    clock = SimpleNamespace(device=CPU, device_seconds=lambda call: (seconds[call()], None))
    streams = [ceilings._Stream("copy", 2**28, 10**9, lambda name=name: name) for name in seconds]
    monkeypatch.setattr(ceilings, "_largest_set", lambda device: torch.ones(1))
    monkeypatch.setattr(ceilings, "_usable_streams", lambda memory, pool, traffics: streams)
    assert ceilings._measure_streams(clock, 1.0, ["copy"]) == {"copy": [(2**28, 1.0)]}


def test_products_grow_until_one_saturates():
    sizes = []

    def device_seconds(call):
        sizes.append(call.args[0].shape[0])
        return (sizes[-1] / 1024) ** 3 * 0.02, None  # 20 ms, which is enough on a CPU, at 1024

    clock = SimpleNamespace(device=CPU, device_seconds=device_seconds)
    rate = ceilings._measure_gemm(clock, "float32", seconds=60.0)
    assert sorted(set(sizes)) == [256, 512, 1024]
    assert rate == pytest.approx(2 * 1024**3 / 0.02 / 1e12)


def test_a_product_that_does_not_fit_ends_the_search_with_the_rate_before():
    def device_seconds(call):
        if call.args[0].shape[0] > 256:
            raise torch.OutOfMemoryError("out of memory")
        return 0.001, None

    clock = SimpleNamespace(device=CPU, device_seconds=device_seconds)
    assert ceilings._measure_gemm(clock, "float32", 60.0) == pytest.approx(2 * 256**3 / 0.001 / 1e12)


def test_a_precision_that_the_device_does_not_multiply_has_no_rate():
    def device_seconds(call):
        raise RuntimeError('"addmm_impl_cpu_" not implemented')

    assert (
        ceilings._measure_gemm(SimpleNamespace(device=CPU, device_seconds=device_seconds), "bfloat16", 1.0)
        is None
    )


@pytest.mark.parametrize("before", ["none", "tf32"])
def test_float32_products_are_ieee_and_the_callers_precision_comes_back(before):
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    original = [backend.fp32_precision for backend in backends]
    seen = []

    def device_seconds(call):
        seen.append([backend.fp32_precision for backend in backends])
        raise RuntimeError("whatever goes wrong in between")

    try:
        for backend in backends:
            backend.fp32_precision = before
        clock = SimpleNamespace(device=CPU, device_seconds=device_seconds)
        ceilings._measure_gemm(clock, "float32", 1.0)
        ceilings._measure_gemm(clock, "tf32", 1.0)
        assert [backend.fp32_precision for backend in backends] == [before, before]
        assert seen == [["ieee", "ieee"], ["tf32", "tf32"]]
    finally:
        for backend, value in zip(backends, original, strict=True):
            backend.fp32_precision = value


def test_rates_between_two_sizes_are_interpolated_and_beyond_them_the_nearest_counts():
    measured = Ceilings("cpu", {"copy": [(2**30, 25.0), (2**26, 100.0)]})
    assert measured.for_bytes("copy", 2**28) == pytest.approx(50.0)  # halfway on a log scale
    assert measured.for_bytes("copy", 2**25) == 100.0
    assert measured.for_bytes("copy", 2**40) == 25.0
    assert measured.for_bytes("copy", 2**20) is None  # there the cost of a call hides the memory
    assert measured.for_bytes("read", 2**28) is None


@pytest.mark.gpu
def test_measures_a_gpu():
    measured = ceilings.measure_ceilings(torch.device("cuda"), seconds=4.0)
    assert set(measured.rates) == set(ceilings.TRAFFICS)
    assert {"float32", "float16"} <= set(measured.gemm)
    assert measured.launch_us > 0
