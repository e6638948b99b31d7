"""superfine.env: a complete description, null where something cannot be read, never a crash."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from superfine import _gpu, env


def test_describes_python_packages_cpu_memory_and_native_modules():
    description = env.environment()
    assert description["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert description["packages"]["torch"] == torch.__version__ or torch.__version__.startswith(
        description["packages"]["torch"]
    )
    assert description["cpu"]["threads"] == torch.get_num_threads()
    assert description["cpu"]["isa"] in ("baseline", "avx2", "avx512")
    assert description["memory"]["total"] > 2**20
    assert description["native"]["_cpu"] == {"built": True, "usable": True}
    assert description["native"]["reader"] == {"torch_functions": True, "torch_records": True}
    assert len(description["cuda"]["devices"]) == torch.cuda.device_count()


def test_is_json():
    description = env.environment()
    assert json.loads(json.dumps(description)) == description


def test_says_why_the_cuda_module_is_not_usable_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    module = env.environment()["native"]["_cuda"]
    assert module["usable"] is False
    assert module["reason"]


def test_what_cannot_be_read_is_none_and_does_not_raise(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("not here")

    for name in ("read_text", "glob"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(env.os, "cpu_count", lambda: None)
    monkeypatch.setattr(env.importlib.metadata, "version", refuse)
    monkeypatch.setattr(torch, "get_num_threads", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", refuse)
    description = env.environment()
    assert description["packages"]["torch"] is None
    assert description["cpu"]["caches"] is None
    assert description["cpu"]["threads"] is None
    assert description["cuda"]["driver"] is None
    assert description["cuda"]["devices"] is None
    assert description["git"] is None
    assert description["memory"]["available"] is None
    assert description["cpu"]["mhz"] is None
    assert description["cpu"]["governor"] is None
    assert description["cpu"]["numa_nodes"] is None
    assert description["peers"] == {}
    assert env.last_level_cache("cpu") is None
    assert env.clock_mhz("cpu") is None
    json.dumps(description)


def test_a_native_module_that_does_not_load_is_reported_with_the_loaders_words(monkeypatch):
    def broken(name):
        raise ImportError("libstdc++.so.6: version not found")

    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(env.importlib, "import_module", broken)
    module = env.environment()["native"]["_cuda"]
    assert module["usable"] is False
    assert "version not found" in module["reason"]


def test_a_copy_inside_another_projects_checkout_has_no_commit(tmp_path, monkeypatch):
    run = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    try:
        subprocess.run([*run, "init", "-q"], cwd=tmp_path, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git is not installed")
    (tmp_path / "other.txt").write_text("another project")
    subprocess.run([*run, "add", "."], cwd=tmp_path, check=True)
    subprocess.run([*run, "commit", "-qm", "first"], cwd=tmp_path, check=True)
    installed = tmp_path / "site-packages" / "env.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(env, "__file__", str(installed))
    assert env.environment()["git"] is None
    monkeypatch.setattr(env, "__file__", str(tmp_path / "other.txt"))
    git = env.environment()["git"]
    assert len(git["commit"]) == 40
    assert git["modified"] is False


def test_prints_every_section_and_readable_sizes():
    output = io.StringIO()
    env.print_environment(Console(file=output, width=120))
    text = output.getvalue()
    assert all(section in text for section in ("python", "packages", "cpu", "memory", "cuda", "native"))
    assert "GiB" in text
    assert torch.__version__.split("+")[0] in text


def test_flat_environment_shows_lists_of_devices_item_by_item():
    flat = env.flat_environment({"cuda": {"driver": None, "devices": [{"name": "A", "memory": 2**33}]}})
    assert flat == {"cuda": [("driver", "unknown"), ("devices[0].name", "A"), ("devices[0].memory", "8 GiB")]}


# --- clocks and caches of the CPU ---------------------------------------------------------------------


@pytest.fixture
def proc(monkeypatch):
    """Files below /proc and /sys as the test says; all others do not exist."""
    files = {}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2})
    return files


def test_the_cpus_clock_is_that_of_the_fastest_core_in_use(proc):
    for core, kilohertz in enumerate((1_200_000, 4_000_000, 3_600_500)):
        proc[f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq"] = f"{kilohertz}\n"
        proc[f"/sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq"] = "4200000\n"
        proc[f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"] = "powersave\n"
    assert env.clock_mhz(torch.device("cpu")) == 3600.5  # core 1 is not ours
    cpu = env.environment()["cpu"]
    assert (cpu["mhz"], cpu["max_mhz"], cpu["governor"]) == (3600.5, 4200.0, "powersave")


def test_without_a_frequency_driver_the_clock_comes_from_cpuinfo(proc):
    proc["/proc/cpuinfo"] = "model name : A\ncpu MHz\t\t: 2700.000\n\ncpu MHz\t\t: 2899.5\n"
    assert env.clock_mhz("cpu") == 2899.5


def test_the_last_level_cache_is_l3_or_else_l2(monkeypatch):
    monkeypatch.setattr(env, "_caches", lambda: {"L1d": 2**15, "L2": 2**21, "L3": 2**25})
    assert env.last_level_cache("cpu") == 2**25
    monkeypatch.setattr(env, "_caches", lambda: {"L1d": 2**15, "L2": 2**21})
    assert env.last_level_cache(torch.device("cpu")) == 2**21


def test_peers_are_those_installed_and_are_not_imported(monkeypatch):
    versions = {"liger-kernel": "0.6.0"}
    monkeypatch.setattr(env.importlib.metadata, "version", versions.__getitem__)
    assert env.environment()["peers"] == versions
    assert "liger_kernel" not in sys.modules


# --- GPUs ---------------------------------------------------------------------------------------------

GPU = SimpleNamespace(
    name="Some GPU",
    uuid="11111111-2222-3333-4444-555555555555",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    pci_domain_id=0,
    pci_bus_id=0x3B,
    pci_device_id=0,
)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A torch that sees one GPU; returns what puts a pynvml with the given functions beside it."""

    def forget():
        _gpu._nvml.cache_clear()
        _gpu._handle.cache_clear()

    def install(**functions):
        nvml = ModuleType("pynvml")
        nvml.nvmlInit = lambda: None
        nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU = 1, 2, 0
        vars(nvml).update(functions)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        forget()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: GPU)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    forget()
    yield install
    forget()


def managed(**changes):
    """NVML's functions as a recent driver answers them."""
    process = SimpleNamespace(pid=77, usedGpuMemory=2**30)
    own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=2**20)
    functions = {
        "nvmlSystemGetDriverVersion": lambda: "570.86.15",
        "nvmlSystemGetCudaDriverVersion": lambda: 12080,
        "nvmlDeviceGetHandleByPciBusId": {b"00000000:3B:00.0": "handle"}.__getitem__,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(free=70 * 2**30),
        "nvmlDeviceGetClockInfo": lambda handle, domain: {1: 1755, 2: 2619}[domain],
        "nvmlDeviceGetMaxClockInfo": lambda handle, domain: {1: 1980, 2: 2619}[domain],
        "nvmlDeviceGetPowerUsage": lambda handle: 123_456,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 41,
        "nvmlDeviceGetEccMode": lambda handle: [1, 1],
        "nvmlDeviceGetMigMode": lambda handle: [0, 1],
        "nvmlDeviceGetPersistenceMode": lambda handle: 1,
        "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 5,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 16,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x24,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [process, own],
        "nvmlDeviceGetGraphicsRunningProcesses": lambda handle: [process],
    }
    return functions | changes


def test_describes_a_gpu_as_the_management_library_does(fake_gpu):
    fake_gpu(**managed())
    cuda = env.environment()["cuda"]
    assert (cuda["driver"], cuda["driver_cuda"]) == ("570.86.15", "12.8")
    assert cuda["devices"] == [
        {
            "name": "Some GPU",
            "uuid": GPU.uuid,
            "compute_capability": "9.0",
            "multiprocessors": 132,
            "memory": 80 * 2**30,
            "memory_free": 70 * 2**30,
            "l2_cache": 50 * 2**20,
            "clock_sm_mhz": 1755,
            "clock_sm_max_mhz": 1980,
            "clock_memory_mhz": 2619,
            "clock_memory_max_mhz": 2619,
            "power_w": 123.5,
            "power_cap_w": 700.0,
            "temperature_c": 41,
            "ecc": True,
            "mig": False,
            "persistence": True,
            "pcie_generation": 5,
            "pcie_width": 16,
            "throttled_by": ["power cap", "software thermal"],
            "other_processes": [{"pid": 77, "memory": 2**30}],
        }
    ]
    assert env.clock_mhz("cuda") == env.clock_mhz(torch.device("cuda", 0)) == 1755.0
    assert env.last_level_cache("cuda:0") == 50 * 2**20
    assert "70 GiB" in dict(env.flat_environment({"cuda": cuda})["cuda"])["devices[0].memory_free"]


@pytest.mark.parametrize("installed", [False, True], ids=["no pynvml", "every reader raises"])
def test_without_the_management_library_torchs_knowledge_remains(fake_gpu, installed):
    def refuse(*arguments):
        raise PermissionError("NVMLError_NoPermission")

    if installed:
        readers = dict.fromkeys(managed(), refuse)
        fake_gpu(**readers | {"nvmlDeviceGetHandleByPciBusId": lambda address: "handle"})
    device = env.environment()["cuda"]["devices"][0]
    known = {name for name, value in device.items() if value is not None}
    assert known == {"name", "uuid", "compute_capability", "multiprocessors", "memory", "l2_cache"}
    assert env.clock_mhz("cuda") is None


def test_a_driver_that_does_not_answer_is_no_error(fake_gpu):
    def no_driver():
        raise RuntimeError("NVMLError_LibraryNotFound")

    fake_gpu(**managed(nvmlInit=no_driver))
    assert env.environment()["cuda"]["devices"][0]["clock_sm_mhz"] is None


def test_an_old_management_library_answers_in_bytes_and_under_old_names(fake_gpu):
    functions = managed(nvmlSystemGetDriverVersion=lambda: b"470.57.02")
    del functions["nvmlDeviceGetCurrentClocksEventReasons"]
    fake_gpu(**functions, nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 1)
    cuda = env.environment()["cuda"]
    assert cuda["driver"] == "470.57.02"
    assert cuda["devices"][0]["throttled_by"] == ["idle"]
    json.dumps(cuda)


def test_a_gpu_that_is_not_at_its_bus_address_is_found_by_uuid(fake_gpu):
    def not_there(address):
        raise LookupError("NVMLError_NotFound")

    by_uuid = {f"GPU-{GPU.uuid}".encode(): "handle"}.__getitem__
    fake_gpu(**managed(nvmlDeviceGetHandleByPciBusId=not_there, nvmlDeviceGetHandleByUUID=by_uuid))
    assert env.clock_mhz("cuda") == 1755.0


def test_free_memory_of_a_whole_gpu_is_not_passed_off_as_a_mig_slices(fake_gpu):
    fake_gpu(**managed(nvmlDeviceGetMigMode=lambda handle: [1, 1]))
    device = env.environment()["cuda"]["devices"][0]
    assert device["mig"] is True
    assert device["memory_free"] is None


def test_a_gpu_that_torch_does_not_see_has_no_clock_and_no_cache(fake_gpu):
    fake_gpu(**managed())
    assert env.clock_mhz("cuda:1") is None
    assert env.last_level_cache("cuda:1") is None


def test_describing_a_machine_without_a_gpu_leaves_cuda_uninitialised():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    env.environment()
    assert (env.clock_mhz("cuda"), env.last_level_cache("cuda")) == (None, None)
    assert not torch.cuda.is_initialized()
