"""Calls under torch.profiler, and what its Chrome trace says of them: self times, kernels, parts, memory.

Times in a trace are in microseconds. A range is what one `record_function` made of one name covers; the sums
here are over all ranges of that name.
"""

from __future__ import annotations

import gzip
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ON_CPU = ("cpu_op", "user_annotation")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
NATIVE = "superfine_kernels._cpu."

Event = dict[str, Any]


@dataclass
class Total:
    """Calls and microseconds of everything of one name; what the GPU was told of its last launch."""

    calls: int = 0
    us: float = 0.0
    launch: dict[str, Any] = field(default_factory=dict)


def record(
    label: str, device: torch.device, prepare: Callable[[], Callable[[], Any]], calls: int, path: Path
) -> Trace:
    """Profile the calls, each in a range called `label` that ends when the device is done."""
    from superfine._files import atomic_write
    from torch.profiler import ProfilerActivity, profile, record_function

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # There is one cycle, of which all events are kept; torch before 2.13 warns where that is not asked for.
    profiler = profile(activities=activities, profile_memory=True, acc_events=True)
    with _native_kernels_in_ranges(), profiler:
        prepare()()  # the first call under a profiler pays for its tables
        for _ in range(calls):
            call = prepare()
            if on_gpu:
                torch.cuda.synchronize(device)
            with record_function(label):
                result = call()
                if on_gpu:
                    torch.cuda.synchronize(device)
            del result
    with atomic_write(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
    return Trace(path, label)


@contextmanager
def _native_kernels_in_ranges() -> Iterator[None]:
    """Give every call into our CPU module a range: its functions take addresses, so no op shows them."""
    from superfine_kernels import _cpu

    functions = {name: value for name, value in vars(_cpu).items() if inspect.isbuiltin(value)}

    def in_range(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with torch.profiler.record_function(NATIVE + name):
                return function(*args, **options)

        return call

    for name, function in functions.items():
        setattr(_cpu, name, in_range(name, function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(_cpu, name, function)


class Trace:
    """The events of a Chrome trace, seen through the ranges called `label`.

    Raises:
        ValueError: no range has that name.
    """

    def __init__(self, path: Path, label: str) -> None:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            self.events: list[Event] = json.load(file)["traceEvents"]
        self.label = label
        spans = [e for e in self.events if e.get("cat") == "user_annotation" and e["name"] == label]
        self.spans = sorted(spans, key=lambda span: span["ts"])
        if not self.spans:
            raise ValueError(f"Trace: label is {label!r}; expected a name that {path} has")

    @property
    def wall_us(self) -> float:
        """Microseconds of all ranges together."""
        return float(sum(span["dur"] for span in self.spans))

    def ops(self) -> dict[str, Total]:
        """Self time by name on the thread of the ranges, themselves included: together their whole time."""
        totals: dict[str, Total] = {}
        for span in self.spans:
            inside = [
                e
                for e in self._within(span, ON_CPU)
                if (e["pid"], e["tid"]) == (span["pid"], span["tid"]) and e["name"] != self.label
            ]
            for event, own in _self_times([span, *inside]):
                total = totals.setdefault(event["name"], Total())
                total.calls += 1
                total.us += own
        return totals

    def kernels(self) -> dict[str, Total]:
        """Time by name of what ran on the GPU, copies and fills included."""
        totals: dict[str, Total] = {}
        for span in self.spans:
            for event in self._within(span, ON_GPU):
                total = totals.setdefault(event["name"], Total())
                total.calls += 1
                total.us += event["dur"]
                total.launch = event.get("args", {})
        return totals

    def busy_us(self) -> float:
        """Microseconds in which at least one kernel, copy or fill ran."""
        busy = 0.0
        for span in self.spans:
            end = span["ts"]
            for event in sorted(self._within(span, ON_GPU), key=lambda e: e["ts"]):
                stop = event["ts"] + event["dur"]
                busy += max(0.0, stop - max(end, event["ts"]))
                end = max(end, stop)
        return busy

    def parts(self, names: Sequence[str], on_gpu: bool) -> dict[str, float]:
        """Milliseconds in a call of the named ranges inside it, as far as there are any; on the GPU its time."""
        found: dict[str, float] = {}
        for span in self.spans:
            for event in self._within(span, ("gpu_user_annotation" if on_gpu else "user_annotation",)):
                if event["name"] in names:
                    found[event["name"]] = found.get(event["name"], 0.0) + event["dur"]
        return {name: found[name] / 1000 / len(self.spans) for name in names if name in found}

    def memory(self, on_gpu: bool, index: int = 0) -> list[tuple[float, int]]:
        """(milliseconds since the start, bytes beyond those at the start) in the last call, after each change."""
        span, points, level = self.spans[-1], [(0.0, 0)], None
        for event in sorted(self._within(span, ("cpu_instant_event",)), key=lambda e: e["ts"]):
            args = event.get("args", {})
            if event["name"] != "[memory]" or (args["Device Type"] == 1) != on_gpu:
                continue
            if on_gpu and args["Device Id"] != index:
                continue
            if level is None:
                level = args["Total Allocated"] - args["Bytes"]
            points.append(((event["ts"] - span["ts"]) / 1000, args["Total Allocated"] - level))
        return [*points, (span["dur"] / 1000, points[-1][1])]

    def _within(self, span: Event, categories: Collection[str]) -> list[Event]:
        start, end = span["ts"], span["ts"] + span["dur"]
        return [e for e in self.events if e.get("cat", "") in categories and start <= e["ts"] <= end]


def _self_times(events: Sequence[Event]) -> list[tuple[Event, float]]:
    """Each event with its duration less that of the events directly inside it; all of one thread."""
    own: list[list[Any]] = []
    stack: list[int] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while stack and event["ts"] >= own[stack[-1]][0]["ts"] + own[stack[-1]][0]["dur"]:
            stack.pop()
        if stack:
            own[stack[-1]][1] -= event["dur"]
        own.append([event, event["dur"]])
        stack.append(len(own) - 1)
    return [(event, max(0.0, us)) for event, us in own]
