"""Benchmark cases that go wrong on purpose. Processes that measure them import this module."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import torch
from superfine_bench import Case, Provider, harness


def double(inputs):
    return lambda: inputs.mul(2)


def hangs(inputs):
    return lambda: time.sleep(60)


def crashes(inputs):
    return lambda: os.kill(os.getpid(), signal.SIGSEGV)


def leaves(inputs):
    os._exit(3)


def case(*providers, inputs=lambda device: torch.arange(64.0, device=device)):
    return Case(
        op="double",
        name="64",
        dtype="float32",
        work="x -> 2x",
        cost=lambda: SimpleNamespace(bytes=512, flops=64),
        traffic="copy",
        memory=512,
        inputs=inputs,
        before=lambda inputs: None,
        check=lambda inputs, call: (call() - 2 * inputs).abs().max().item() / 1e-6,
        providers=(Provider("first", double), *providers),
        resident=True,
    )


def good(key):
    return case(Provider("other", double))


def bad(key):
    return case(
        Provider("hangs", hangs),
        Provider("crashes", crashes),
        Provider("leaves", leaves),
        Provider("last", double),
    )


def raises(inputs):
    raise RuntimeError("CUDA error: an illegal memory access\nmore lines")


def ends_its_process(key):
    """A case that takes an error as one on a GPU is taken: everything after it in that process is in doubt."""

    def failed(row, error):
        raise error

    harness._failed = failed
    return case(Provider("raises", raises), Provider("last", double))


def waits_for_a_thread(inputs):
    threading.Thread(target=time.sleep, args=(60,)).start()
    return double(inputs)


def does_not_end(key):
    return case(Provider("waits", waits_for_a_thread))


def cannot_be_made(key):
    raise MemoryError("no room for it")


def bad_inputs(key):
    return case(inputs=lambda device: os._exit(4))
