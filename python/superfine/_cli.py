"""What every command of ``superfine`` shares: its console, the option --debug, errors as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def console() -> Console:
    """A console as wide as the terminal, or 110 columns: a log has no width of its own."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=110)


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """What goes wrong becomes one line on stderr and an exit code, unless the traceback is asked for."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        wrong_input = isinstance(error, (ValueError, TypeError, OSError, ImportError, ArithmeticError))
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kind = "" if wrong_input else f"{type(error).__name__}: "
        hint = "" if wrong_input else " (--debug shows where)"
        typer.echo(f"superfine: {kind}{lines[0]}{hint}", err=True)
        raise typer.Exit(2 if wrong_input else 1) from None
