"""The commands that measure: bench, compare, report, profile. What they call is the package superfine_bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from superfine._cli import Debug, console, errors

ARCHITECTURES = "sm_80,sm_90,sm_100,sm_120"


def add_commands(app: typer.Typer) -> None:
    """Add the commands to `app`."""

    @app.command()
    def bench(
        only: Annotated[str | None, typer.Option(help="One op, such as adamw or train_step.")] = None,
        quick: Annotated[bool, typer.Option("--quick", help="A few minutes; no torch.compile.")] = False,
        full: Annotated[bool, typer.Option("--full", help="More turns, narrower intervals.")] = False,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        out: Annotated[
            Path | None, typer.Option(help="Folder for the results; default: results/bench-TIME.")
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with the results in --out.")] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Only compile the GPU kernels; needs no GPU.")
        ] = False,
        arch: Annotated[
            str | None, typer.Option(help=f"With --dry-run: architectures; default: {ARCHITECTURES}.")
        ] = None,
        bandwidth: Annotated[
            float | None, typer.Option(help="With --dry-run: GB/s, for predicted times.")
        ] = None,
        install_peers: Annotated[
            bool,
            typer.Option("--install-peers", help="Print the pip line for the libraries to compare with."),
        ] = False,
        debug: Debug = False,
    ) -> None:
        """Time every op beside eager torch and the libraries found here, against this machine's own limits."""
        with errors(debug):
            import superfine_bench

            if install_peers:
                from superfine_bench.peers import install_line

                typer.echo(install_line())
                return
            if dry_run:
                from superfine_bench.dry_run import dry_run as compile_all
                from superfine_bench.dry_run import print_dry_run

                archs = (arch or ARCHITECTURES).split(",")
                print_dry_run(console(), compile_all(archs, bandwidth))
                return
            for option, value in (("--arch", arch), ("--bandwidth", bandwidth)):
                if value is not None:
                    raise ValueError(f"bench: {option} is {value}; expected it with --dry-run")
            if quick and full:
                raise ValueError("bench: --quick and --full are both given; expected one of them")
            if resume and out is None:
                raise ValueError(
                    "bench: --resume without a folder; expected --out DIR of the run to go on with"
                )
            from superfine_bench.run import failures, run

            settings = superfine_bench.QUICK if quick else superfine_bench.FULL if full else None
            result = run(
                only=only,
                device=device,
                settings=settings,
                out=out or _new_folder(),
                resume=resume,
                console=console(),
            )
            for line in (wrong := failures(result.rows)):
                typer.echo(line, err=True)
            if wrong:
                raise typer.Exit(1)

    @app.command()
    def compare(
        before: Annotated[Path, typer.Argument(metavar="A", help="Results: a folder or bench.jsonl.")],
        after: Annotated[Path, typer.Argument(metavar="B", help="Results to compare with A.")],
        fail_on: Annotated[str, typer.Option(help="Change that counts, as 3% or 0.03.")] = "3%",
        force: Annotated[bool, typer.Option("--force", help="Compare different devices, too.")] = False,
        debug: Debug = False,
    ) -> None:
        """Say for every row of two runs: same, faster, slower or unclear. Exit code 1 if something is slower."""
        with errors(debug):
            from superfine_bench import read
            from superfine_bench.compare import compare as compare_runs
            from superfine_bench.compare import failed, print_comparison

            comparisons = compare_runs(read(before), read(after), threshold=_share(fail_on), force=force)
            print_comparison(console(), comparisons)
            if failed(comparisons):
                raise typer.Exit(1)

    @app.command()
    def report(
        results: Annotated[Path, typer.Argument(help="Results: a folder or bench.jsonl.")],
        out: Annotated[Path | None, typer.Option(help="Folder for the report; default: beside them.")] = None,
        debug: Debug = False,
    ) -> None:
        """Draw the report of a benchmark run again: report.html, bench.png, bench.csv."""
        with errors(debug):
            from superfine_bench import read
            from superfine_bench.report import print_tables, write

            run = read(results)
            shown = console()
            print_tables(shown, run.rows)
            if run.broken:
                shown.print(f"{run.broken} lines of {results} could not be read and were left out")
            for path in write(run, out or (results if results.is_dir() else results.parent)):
                shown.print(f"    {path}", markup=False, highlight=False, soft_wrap=True)

    @app.command()
    def profile(
        op: Annotated[str, typer.Argument(help="adamw, cross_entropy, ..., or train for a whole step.")],
        case: Annotated[str | None, typer.Option(help="Part of the case's name; default: the first.")] = None,
        provider: Annotated[str, typer.Option(help="Who does the work.")] = "superfine",
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        out: Annotated[Path, typer.Option(help="Folder for trace and numbers.")] = Path("results/profile"),
        ncu: Annotated[bool, typer.Option("--ncu", help="Read the GPU's counters, too.")] = False,
        debug: Debug = False,
    ) -> None:
        """Show where the time of one op, or of one training step, goes."""
        with errors(debug):
            from superfine_bench import UnavailableError
            from superfine_bench.profile import find_case, print_profile, profile_case
            from superfine_bench.run import find_device

            target = find_device(device)
            chosen, who = find_case(op, case, provider, target.type)
            try:
                profiled = profile_case(chosen, who, target, out, ncu=ncu)
            except UnavailableError as reason:
                raise ValueError(
                    f"profile: provider is {provider!r}; expected one that can run here ({reason})"
                ) from reason
            print_profile(console(), profiled)


def _new_folder() -> Path:
    import datetime

    return Path("results", f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}")


def _share(text: str) -> float:
    """``3%`` or ``0.03`` as a number."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"compare: --fail-on is {text}; expected a share such as 3% or 0.03")
    return share
