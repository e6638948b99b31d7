"""What stands in the label column of a row: a class name, a number, or a text. What is wrong is said in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["LabelParser", "class_label", "number_label", "text_label", "text_problem"]

# From a record and a column's name to the label, and what is wrong with it: "" where nothing is.
LabelParser = Callable[[dict[str, Any], str], "tuple[Any, str]"]


def class_label(record: dict[str, Any], name: str) -> tuple[Any, str]:
    """A class name: text, or a whole number or a truth value as text."""
    value = record.get(name)
    if _empty(value):
        return None, f"{name} is empty"
    if isinstance(value, bool):
        return str(value).lower(), ""
    if isinstance(value, (str, int)):
        return str(value).strip(), ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value)), ""
    return None, f"{name} is {value!r}; expected a class name (for numbers use loss = 'mse')"


def number_label(record: dict[str, Any], name: str) -> tuple[Any, str]:
    """A finite number."""
    value = record.get(name)
    if _empty(value):
        return None, f"{name} is empty"
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None, f"{name} is {value!r}; expected a number for loss = 'mse'"
    if math.isfinite(number):
        return number, ""
    return None, f"{name} is {number}; expected a finite number"


def text_label(record: dict[str, Any], name: str) -> tuple[Any, str]:
    """A text that is not empty."""
    problem = text_problem(record, name)
    return (None, problem) if problem else (record[name], "")


def text_problem(record: dict[str, Any], name: str) -> str:
    """What is wrong with a text column of a record: nothing, ``""``, where it holds some."""
    value = record.get(name)
    if not isinstance(value, str):
        return f"{name} is {value!r}; expected text" if name in record else f"no key {name!r}"
    return "" if value.strip() else f"{name} is empty"


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
