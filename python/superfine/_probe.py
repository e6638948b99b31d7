"""Reading what may not be there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def attempt(read: Callable[[], T]) -> T | None:
    """Return what ``read`` returns, or None: a description must not fail on an unusual machine."""
    try:
        return read()
    except Exception:
        return None


def output_of(*command: str, cwd: Path | None = None) -> str | None:
    """Standard output of a short command; None when it is missing, fails or hangs."""

    def call() -> str:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    return attempt(call)
