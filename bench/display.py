"""How rows are grouped and how their numbers are written, the same in every table, picture and page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .records import Row

#: Statuses that say something is broken, as opposed to not there.
FAILED = ("wrong", "error", "timeout", "out of memory")

SHORT_DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by op, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.op, []).append(row)
    return groups


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by case and device, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case_key, []).append(row)
    return list(groups.values())


def baseline_of(case: Sequence[Row]) -> str:
    """The provider that a case's ratios refer to; a row of a provider that crashed may not name it."""
    return next((row.baseline for row in case if row.baseline), case[0].provider)


def is_ours(provider: str) -> bool:
    """Whether it is one of Superfine's."""
    return provider.startswith("superfine")


def does_the_case(provider: str) -> bool:
    """Whether it is ours and does what the case asks for; ``superfine AdamW`` stands beside LAMB for scale only."""
    return provider.split(",")[0] == "superfine"


def best_of_ours(case: Sequence[Row]) -> Row | None:
    """Our fastest provider in a case, by its ratio to the baseline; one that is suspect is none to boast of."""
    ours = [row for row in case if does_the_case(row.provider) and row.status == "ok" and row.ratio]
    return max(ours, key=lambda row: row.ratio or 0, default=None)


def case_name(row: Row) -> str:
    """The case with its dtype."""
    return f"{row.case}, {SHORT_DTYPES.get(row.dtype, row.dtype)}"


def number(value: float | None, missing: str = "") -> str:
    """Three significant digits, without an exponent where a person would write none."""
    if value is None:
        return missing
    return f"{value:.0f}" if 99.95 <= abs(value) < 1e6 else f"{value:#.3g}"


def times(ratio: float | None, missing: str = "") -> str:
    """A ratio, as in ``1.52x``."""
    if ratio is None:
        return missing
    return f"{ratio:.2f}x" if ratio < 10 else f"{number(ratio)}x"


def interval(low: float | None, high: float | None) -> str:
    """Bounds of a ratio or a time; nothing where they are one, as for the baseline's ratio to itself."""
    return "" if low is None or high is None or low == high else f"{number(low)}-{number(high)}"


def size(count: int | None) -> str:
    """Bytes in the unit that suits them."""
    if count is None:
        return ""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{number(count / one)} {unit}"
    return f"{count} B"


def arithmetic_bound(row: Row) -> bool:
    """Whether the matrix product and not the memory is the nearer of the row's ceilings."""
    if row.flops is None or not row.ceiling_tflop_per_s:
        return False
    if row.bytes is None or not row.ceiling_gb_per_s:
        return True
    return row.flops / (1000 * row.ceiling_tflop_per_s) > row.bytes / row.ceiling_gb_per_s


def rate(row: Row) -> str:
    """The rate that counts: of arithmetic where that is the limit, else of memory."""
    if arithmetic_bound(row) and row.tflop_per_s is not None:
        return f"{number(row.tflop_per_s)} TFLOP/s"
    return "" if row.gb_per_s is None else f"{number(row.gb_per_s)} GB/s"
