"""The rotary embedding in a `config.json`: its theta and scaling, from any of the spellings that files have.

Next: `rope.py`, which computes the frequencies.
"""

import math
from dataclasses import dataclass
from typing import Literal

from rmr1_jax.model.config_fields import FieldReader, short

# fmt: off
ROPE_FIELDS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset({
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    }),
}
# fmt: on
ROPE_NAMES = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})  # of every kind


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length. All but `kind` and `factor` are yarn's.

    Units: `original_max_position_embeddings` in tokens; `beta_fast` and `beta_slow` in turns over that length.
    `attention_factor` is already resolved (1 for linear), so nothing downstream needs yarn's `mscale` rules.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def parse_rope(reader: FieldReader, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Rope theta and scaling from any spelling: `type` or `rope_type`, in `rope_scaling` or in `rope_parameters`."""
    raw, problems = reader.raw, reader.problems
    given = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    for name, value in given.items():
        if not isinstance(value, dict):
            reader.wrong(name, "an object")
            return 1e4, None
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        problems.append("rope_scaling and rope_parameters: both given and different; keep one")
    where, fields = next(iter(given.items()), ("rope_parameters", {}))
    rope = FieldReader(fields, where + ".", problems)
    theta = rope.positive_float("rope_theta", default=reader.positive_float("rope_theta", default=1e4))
    if None not in (raw.get("rope_theta"), fields.get("rope_theta")) and raw["rope_theta"] != fields["rope_theta"]:
        problems.append(f"rope_theta: {raw['rope_theta']} here, {fields['rope_theta']} in {where}; keep one")
    if theta <= 1:
        problems.append(f"rope_theta: got {theta}, expected a number above 1 (usually 10000 or 1000000)")
    kinds = [fields[name] for name in ("rope_type", "type") if fields.get(name) is not None] or ["default"]
    if str(kinds[0]) not in ROPE_FIELDS or kinds[-1] != kinds[0]:
        problems.append(f"{where}.rope_type: got {short(kinds)}, expected one of {', '.join(sorted(ROPE_FIELDS))}")
        return theta, None
    if fields.get("partial_rotary_factor") not in (None, 1):
        rope.wrong("partial_rotary_factor", "1")
    for name in sorted(fields.keys() - ROPE_FIELDS[kinds[0]] - ROPE_NAMES):
        problems.append(f"{where}.{name}: unknown field for rope type {kinds[0]} (got {short(fields[name])})")
    return theta, _parse_scaling(rope, kinds[0], max_positions)


def _parse_scaling(rope: FieldReader, kind: str, max_positions: int) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope.positive_float("factor"))
    original = rope.positive_int("original_max_position_embeddings", default=max_positions)
    factor = rope.positive_float("factor", default=max_positions / original if "factor" in rope.raw else None)
    mscales = [rope.positive_float(name, default=0.0) for name in ("mscale", "mscale_all_dim")]
    inferred = _yarn_attention(factor, *mscales) if all(mscales) else _yarn_attention(factor, 1.0, 0.0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.positive_float("beta_fast", default=32.0),
        beta_slow=rope.positive_float("beta_slow", default=1.0),
        attention_factor=rope.positive_float("attention_factor", default=inferred),
        truncate=rope.boolean("truncate", default=True),
    )


def _yarn_attention(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """Yarn's temperature on cosine and sine, 0.1 ln(factor) + 1 (equation 22), or DeepSeek's ratio of two such."""
    if factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * mscale_all_dim * math.log(factor) + 1.0)
