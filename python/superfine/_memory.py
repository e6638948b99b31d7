"""The peak memory of a phase of a run."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """``with PeakMemory(device) as memory:`` and then, in bytes, what was held ``before`` and at the ``peak``.

    On a GPU what torch has allocated there, else what of this process is resident; None where the system does
    not tell (not Linux).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = None
        self.peak: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        with suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL(None).malloc_trim(0)  # what loading left over must not serve unseen
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of what came before
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        elif self.before is not None:
            self.peak = _status("VmHWM")


def _status(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return None if found is None else int(found.group(1)) * 1024
