"""pytest-benchmark front end over the same cases: ``pytest bench/ [-k adamw] [--benchmark-json FILE]``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from superfine_bench import (
    Case,
    Provider,
    UnavailableError,
    all_cases,
)

# What is measured beside us may warn, torch.compile's own imports for instance.
pytestmark = pytest.mark.filterwarnings("default")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PAIRS = [
    pytest.param(device, case, provider, id=f"{device}-{case.key}-{provider.name}".replace(" ", "_"))
    for device in DEVICES
    for case in all_cases(device=device)
    for provider in case.providers
]


@pytest.fixture(scope="module")
def inputs_of() -> Iterator[Any]:
    """Inputs of the case that is being measured; those of the case before are let go."""
    held: dict[str, Any] = {}

    def get(case: Case, device: str) -> Any:
        key = f"{device} {case.key}"
        if key not in held:
            held.clear()
            held[key] = case.inputs(torch.device(device))
        return held[key]

    yield get
    held.clear()


@pytest.mark.parametrize(("device", "case", "provider"), PAIRS)
def test_speed(benchmark: Any, inputs_of: Any, device: str, case: Case, provider: Provider) -> None:
    benchmark.group = f"{device} {case.key}: {case.work}"
    inputs = inputs_of(case, device)
    try:
        call = provider.build(inputs)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    case.before(inputs)
    assert case.check(inputs, call) <= 1

    def finished_call() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["bytes"] = case.cost().bytes
    benchmark.pedantic(finished_call, setup=lambda: case.before(inputs), rounds=10, warmup_rounds=1)
    case.before(inputs)
    assert case.check(inputs, call) <= 1
