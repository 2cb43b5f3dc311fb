"""Types that the commands of `rmr1` share for their arguments. Next: `cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

ConfigFile = Annotated[Positional[Path], arg(metavar="CONFIG.yaml")]


Overrides = Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")]


Dtype = Literal["bfloat16", "float32"]


# Where nothing is given, the help text says what happens.
MaybeInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]


MaybeFloat = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]


MaybePath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]


MaybeText = Annotated[str | None, arg(metavar="STR", help_behavior_hint="")]
