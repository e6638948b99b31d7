"""What torch and NVIDIA's management library (NVML) say about the GPUs; None for whatever they do not.

NVML is read through the optional package nvidia-ml-py (module ``pynvml``). Without it there are no clocks, power,
temperature or processes.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._probe import attempt, output_of

if TYPE_CHECKING:
    import torch

# Bits of nvmlClocksEventReasons (nvml.h); pynvml has renamed its constants over time.
THROTTLE_REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal",
    0x040: "hardware thermal",
    0x080: "power brake",
    0x100: "display clocks",
}


def describe() -> dict[str, Any]:
    """Driver, toolkit and every GPU that torch can use; CUDA is not initialised where there is none."""

    def toolkit() -> str | None:
        import torch

        return torch.version.cuda

    def devices() -> list[dict[str, Any]]:
        import torch

        # device_count() is quiet without a driver, where other torch.cuda calls warn or raise.
        return [_device(index) for index in range(torch.cuda.device_count())]

    return {
        "torch_toolkit": attempt(toolkit),
        "driver": _driver(),
        "driver_cuda": attempt(_driver_cuda),
        "devices": attempt(devices),
    }


def sm_clock_mhz(device: torch.device | str) -> float | None:
    """Current clock of a CUDA device's multiprocessors."""
    nvml, handle = _nvml(), _handle(_index(device))
    if nvml is None or handle is None:
        return None
    return attempt(lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)))


def l2_cache(device: torch.device | str) -> int | None:
    """Bytes of a CUDA device's L2."""
    properties = _properties(_index(device))
    return getattr(properties, "L2_cache_size", None)


def _device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    return {
        "name": properties.name,
        "uuid": None if uuid is None else str(uuid),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2_cache": getattr(properties, "L2_cache_size", None),
        **_managed(_nvml(), _handle(index)),
    }


def _managed(nvml: Any, handle: Any) -> dict[str, Any]:
    """What NVML knows of a device. Each value is read on its own: old drivers, containers and MIG refuse some."""

    def read(name: str, *arguments: str) -> Any:
        """`nvmlDevice<name>` of the device; arguments are names of constants."""
        if handle is None:
            return None
        return attempt(
            lambda: getattr(nvml, f"nvmlDevice{name}")(handle, *(getattr(nvml, a) for a in arguments))
        )

    def scaled(value: Any, factor: float) -> float | None:
        return attempt(lambda: round(value * factor, 1))

    def enabled(value: Any) -> bool | None:
        """Modes come as an integer, or as a pair of what is and what will be after a reboot."""
        return attempt(lambda: bool(value[0] if isinstance(value, (list, tuple)) else int(value)))

    mig = enabled(read("GetMigMode"))
    return {
        # Asking torch would create a context, of some hundred MB. With MIG on, this is not the slice's.
        "memory_free": None if mig else attempt(lambda: int(read("GetMemoryInfo").free)),
        "clock_sm_mhz": read("GetClockInfo", "NVML_CLOCK_SM"),
        "clock_sm_max_mhz": read("GetMaxClockInfo", "NVML_CLOCK_SM"),
        "clock_memory_mhz": read("GetClockInfo", "NVML_CLOCK_MEM"),
        "clock_memory_max_mhz": read("GetMaxClockInfo", "NVML_CLOCK_MEM"),
        "power_w": scaled(read("GetPowerUsage"), 1e-3),
        "power_cap_w": scaled(read("GetEnforcedPowerLimit"), 1e-3),
        "temperature_c": read("GetTemperature", "NVML_TEMPERATURE_GPU"),
        "ecc": enabled(read("GetEccMode")),
        "mig": mig,
        "persistence": enabled(read("GetPersistenceMode")),
        "pcie_generation": read("GetCurrPcieLinkGeneration"),
        "pcie_width": read("GetCurrPcieLinkWidth"),
        "throttled_by": _throttle_reasons(
            read("GetCurrentClocksEventReasons") or read("GetCurrentClocksThrottleReasons")
        ),
        "other_processes": _other_processes(
            read("GetComputeRunningProcesses"), read("GetGraphicsRunningProcesses")
        ),
    }


def _throttle_reasons(bits: int | None) -> list[str] | None:
    return None if bits is None else [name for bit, name in THROTTLE_REASONS.items() if bits & bit]


def _other_processes(*lists: Any) -> list[dict[str, int | None]] | None:
    """Processes on the device but this one; inside a container NVML may show none, or this one by its outer pid."""
    if all(processes is None for processes in lists):
        return None
    found = {process.pid: process for processes in lists for process in processes or ()}
    return [
        {"pid": pid, "memory": getattr(process, "usedGpuMemory", None)}
        for pid, process in sorted(found.items())
        if pid != os.getpid()
    ]


def _driver() -> str | None:
    nvml = _nvml()
    version = attempt(lambda: _text(nvml.nvmlSystemGetDriverVersion()))
    if version:
        return version
    text = attempt(Path("/proc/driver/nvidia/version").read_text) or ""
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    if match:
        return match.group(1)
    listed = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0].strip() if listed else None


def _driver_cuda() -> str:
    """The newest CUDA version that the driver runs."""
    version = _nvml().nvmlSystemGetCudaDriverVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def _text(value: str | bytes) -> str:
    """Older versions of pynvml return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


@functools.cache
def _nvml() -> Any:
    """The module pynvml, initialised; None without the package, a driver or the permission."""

    def load() -> Any:
        import pynvml

        pynvml.nvmlInit()
        return pynvml

    return attempt(load)


@functools.cache
def _handle(index: int) -> Any:
    """NVML's handle of torch's device `index`, which counts other devices and in another order.

    The address on the PCI bus comes first: a MIG slice has the one of its GPU, but a UUID of its own.
    """
    nvml, properties = _nvml(), _properties(index)
    if nvml is None or properties is None:
        return None
    finders: tuple[Callable[[], Any], ...] = (
        lambda: nvml.nvmlDeviceGetHandleByPciBusId(
            f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0".encode()
        ),
        lambda: nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}".encode()),
    )
    return next((handle for handle in map(attempt, finders) if handle is not None), None)


def _properties(index: int) -> Any:
    def read() -> Any:
        import torch

        return torch.cuda.get_device_properties(index) if index < torch.cuda.device_count() else None

    return attempt(read)


def _index(device: torch.device | str) -> int:
    _, _, index = str(device).partition(":")
    if index:
        return int(index)
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0
