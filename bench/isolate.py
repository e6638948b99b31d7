"""Each case in a process of its own: no case profits from memory that another one freed, and none ends the run.

Eager cross-entropy over 1024 x 30522 takes 57 ms in a heap that another case has grown and 150 ms in memory
fresh from the system, as a training step sees it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import Case, Ceilings, Row, Settings, all_cases
from .harness import measure, providers_of


def case_by_key(key: str) -> Case:
    """The case of that :attr:`Case.key`."""
    return next(case for case in all_cases(key.split("/")[0]) if case.key == key)


def measure_alone(
    case: Case,
    device: torch.device,
    settings: Settings,
    ceilings: Ceilings | None,
    find: Callable[[str], Case] = case_by_key,
) -> list[Row]:
    """:func:`measure` in a process of its own; a provider that hangs or crashes it gets a row that says so.

    The case is then measured again without that provider. The process finds the case by its key: what a case
    holds cannot be sent.
    """
    lost: dict[str, Row] = {}
    while True:
        arguments = (find, case.key, device, settings, ceilings, tuple(lost))
        rows, culprit, status, note = _attempt(arguments, settings.timeout)
        if rows is not None:
            found = {row.provider: row for row in rows} | lost
            return [found[provider.name] for provider in providers_of(case, settings)]
        failed = Row(case.op, case.name, case.dtype, case.work, "", str(device), status, note)
        left = [provider.name for provider in providers_of(case, settings) if provider.name not in lost]
        if culprit not in left:  # the inputs themselves, before any provider's turn
            lost |= {name: replace(failed, provider=name) for name in left}
            return [lost[provider.name] for provider in providers_of(case, settings)]
        lost[culprit] = replace(failed, provider=culprit)


def _attempt(arguments: tuple[Any, ...], timeout: float) -> tuple[list[Row] | None, str, str, str]:
    """Rows; or None with the provider at work when the process hung or died, the status and a note."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure_by_key, args=(theirs, *arguments))
    process.start()
    theirs.close()
    provider = ""
    try:
        while ours.poll(timeout):
            try:
                message = ours.recv()
            except EOFError:
                process.join()
                return None, provider, "error", _how_it_ended(process.exitcode)
            if not isinstance(message, str):
                process.join()
                return message, provider, "ok", ""
            provider = message
        return None, provider, "timeout", f"no end after {timeout:.0f} s"
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"its process died of {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


def _measure_by_key(
    results: Connection,
    find: Callable[[str], Case],
    key: str,
    device: torch.device,
    settings: Settings,
    ceilings: Ceilings | None,
    leave_out: tuple[str, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    results.send(measure(find(key), device, settings, ceilings, leave_out=leave_out, tell=results.send))
