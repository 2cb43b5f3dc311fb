"""Reads the fields of a `config.json` and notes what is wrong with them, so that one error can name everything.

Next: `config_rope.py` and `config.py`, which read a model's shape with it.
"""

import json
from typing import Any

MOST = 2**31 - 1  # the largest whole number: positions and sizes are int32


class FieldReader:
    """Reads typed fields, noting what is wrong instead of raising, so that one error can name everything."""

    def __init__(self, raw: dict[str, Any], prefix: str = "", problems: list[str] | None = None):
        self.raw, self.prefix = raw, prefix
        self.problems: list[str] = [] if problems is None else problems

    def wrong(self, name: str, expected: str) -> None:
        got = f"got {short(self.raw[name])}" if name in self.raw else "missing"
        self.problems.append(f"{self.prefix}{name}: {got}, expected {expected}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name, default)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST:
            return value
        self.wrong(name, "a whole number")
        return 1

    def positive_int(self, name: str, default: int | None = None, most: int = MOST) -> int:
        value = self.integer(name, default)
        if 0 < value <= most:
            return value
        self.wrong(name, f"a whole number from 1 to {most}")
        return 1

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None and default is not None:
            return float(default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 1e-18 < value < 1e18:
            return float(value)
        self.wrong(name, "a number above 0 and below 1e18")
        return 1.0

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.wrong(name, "true or false")
        return default


def short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
