"""What every test starts from: a seed, no warning given yet, the marker rules, torch's threads put back."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import triton_interpreter

from superfine_kernels._library import warn_once

# A shell that runs the tests in the background has SIGINT ignored; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run and machine, and no folder of past failures beside the sources. The fixtures
# below hold for all examples of a test together, which is what they are for.
hypothesis.settings.register_profile(
    "superfine",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("superfine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "triton_interpreter": None if triton_interpreter.ACTIVE else "needs TRITON_INTERPRET=1",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fresh_start() -> Iterator[None]:
    torch.manual_seed(0)
    random.seed(0)
    warn_once.cache_clear()  # a test that expects the first warning of a process must get it
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that a kernel that leaves an element out is seen.

    Not for all tests: torch's deterministic mode also changes which algorithms run, and refuses some on GPUs.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
