"""What every test starts from: a seed, no warning given yet, the marker rules, torch's threads put back."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import support
import torch
import triton_interpreter

from superfine_kernels import _backends
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


# --- kernels on a GPU ---------------------------------------------------------------------------------------


@pytest.fixture(params=["cuda", "triton"])
def backend(request) -> str:
    reason = _backends.why_unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cuda_module():
    reason = _backends.why_unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)
    from superfine_kernels import _cuda

    return _cuda


# --- runs of superfine tune; what they need is imported late: transformers takes seconds --------------------


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny BERT without a head. Tests share it and change nothing in it."""
    from tiny_models import tiny_bert

    return tiny_bert(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 labelled texts: 80 to train on, which is ten steps of 8 an epoch, and 10 each to validate and test."""
    from tiny_models import sentiment_rows, write_csv

    return write_csv(tmp_path_factory.mktemp("data") / "data.csv", sentiment_rows(100))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of this size are not worth a second thread, which on a busy machine costs more than it does."""
    with support.threads(1):
        yield


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report takes longer than the run."""
    monkeypatch.setattr("superfine.tune._write_report", lambda directory, listener: None)
