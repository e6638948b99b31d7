"""What is measured runs in a process of its own: nothing profits from memory that something else freed, and nobody
ends the run.

Eager cross-entropy over 1024 x 30522 takes 57 ms in a heap that another case has grown and 150 ms in memory
fresh from the system, as a training step sees it. On a GPU an error may spoil the context of the whole process.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import Case, Ceilings, Row, Settings, all_cases
from .ceilings import measure_ceilings
from .harness import failure, measure, providers_of

# For a process to end that has sent its result, or that was killed. One may wait for threads that never end.
LEAVE_SECONDS = 10.0
# What optimizers and models import on first use takes as long as most cases; transformers need not be there.
IMPORTED = ["torch", "torch._dynamo", "transformers.modeling_utils"]

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """How work in another process ended instead of with a result: the status and the note of its row."""

    status: str
    note: str


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
        told: list[str] = []
        arguments = (find, case.key, device, settings, ceilings, tuple(lost))
        outcome = _alone(_measure_by_key, arguments, settings.timeout, told.append)
        if not isinstance(outcome, Failure):
            found = {row.provider: row for row in outcome} | lost
            return [found[provider.name] for provider in providers_of(case, settings)]
        failed = Row(
            case.op, case.name, case.dtype, case.work, "", str(device), outcome.status, outcome.note,
            baseline=case.providers[0].name,
        )  # fmt: skip
        left = [provider.name for provider in providers_of(case, settings) if provider.name not in lost]
        if not told or told[-1] not in left:  # the inputs themselves, before any provider's turn
            lost |= {name: replace(failed, provider=name) for name in left}
            return [lost[provider.name] for provider in providers_of(case, settings)]
        lost[told[-1]] = replace(failed, provider=told[-1])


def ceilings_alone(
    device: torch.device, seconds: float, say: Tell, *, only: str | None = None, timeout: float = 300.0
) -> Ceilings:
    """:func:`measure_ceilings` in a process of its own, which takes its memory and its GPU context with it.

    Raises:
        RuntimeError: it failed, hung or died.
    """
    outcome = _alone(_measure_ceilings, (device, seconds, only), timeout, say)
    if isinstance(outcome, Failure):
        raise RuntimeError(f"bench: the ceilings of {device} cannot be measured: {outcome.note}")
    found: Ceilings = outcome
    return found


def _measure_by_key(
    find: Callable[[str], Case],
    key: str,
    device: torch.device,
    settings: Settings,
    ceilings: Ceilings | None,
    leave_out: tuple[str, ...],
    tell: Tell,
) -> list[Row]:
    return measure(find(key), device, settings, ceilings, leave_out=leave_out, tell=tell)


def _measure_ceilings(device: torch.device, seconds: float, only: str | None, tell: Tell) -> Ceilings:
    return measure_ceilings(device, seconds, tell, only=only)


def _alone(work: Callable[..., Any], arguments: tuple[Any, ...], timeout: float, hear: Tell) -> Any:
    """What ``work(*arguments, tell)`` returns in another process, or the :class:`Failure` that it ended with.

    ``hear`` gets what it tells; between two words of it, ``timeout`` seconds may pass.
    """
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, work, arguments))
    # Ctrl-C is ours, and ends that process: it must not die of it while it still imports, with a traceback.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    theirs.close()
    try:
        while ours.poll(timeout):
            try:
                message = ours.recv()
            except EOFError:
                process.join(LEAVE_SECONDS)
                return Failure("error", _how_it_ended(process.exitcode))
            if not isinstance(message, str):
                process.join(LEAVE_SECONDS)
                return message
            hear(message)
        return Failure("timeout", f"no end after {timeout:.0f} s")
    finally:
        if process.is_alive():
            process.kill()
            process.join(LEAVE_SECONDS)
        ours.close()


def _context() -> Any:
    """Processes are forked from one that has imported what takes seconds to import, and has run nothing.

    Our own libraries are not among that: they use one thread in a process that was forked after they were imported.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _send(results: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        outcome = work(*arguments, results.send)
    except Exception as error:
        outcome = Failure(*failure(error))
    results.send(outcome)


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is None:
        return "its process neither answered nor ended"
    if exit_code < 0:
        return f"its process died of {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"
