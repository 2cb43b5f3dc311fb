"""Rotary positions: how `config.json` spells them, and the frequencies that come of it. Read by `config.py`; next:
`qwen.py`, which turns by them."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rmr1_jax.model.fields import FieldReader, short

if TYPE_CHECKING:
    from rmr1_jax.model.config import QwenConfig

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


def rope_inverse_frequencies(config: "QwenConfig") -> tuple[np.ndarray, float]:
    """Rotary frequencies in radians a position, float32 [H/2], and the factor on cosine and sine.

    Computed in float32 step by step as Transformers does, so that long positions see the same angles. Linear: the
    frequencies divided by the factor. Yarn (Peng et al. 2023, arXiv:2309.00071, section 3.2): fast pairs keep their
    frequency, slow pairs are divided by the factor, with a linear ramp between.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    periods = np.power(np.float32(config.rope_theta), exponents)  # [H/2], tokens per radian
    rope = config.rope_scaling
    if rope is None:
        return np.float32(1) / periods, 1.0
    factor = np.float32(rope.factor)
    if rope.kind == "linear":
        return np.float32(1) / periods / factor, 1.0
    low, high = _yarn_ramp(config, rope)
    ramp = np.clip((np.arange(config.head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1) - ramp
    frequencies = np.float32(1) / (factor * periods) * (np.float32(1) - keep) + np.float32(1) / periods * keep
    return frequencies.astype(np.float32), rope.attention_factor


def _yarn_ramp(config: "QwenConfig", rope: RopeScaling) -> tuple[float, float]:
    """The pair indices between which yarn goes from keeping a frequency to dividing it."""

    def pair_with_turns(turns: float) -> float:
        length = rope.original_max_position_embeddings
        return config.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    return low, high + 0.001 if low == high else high


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
    for name in sorted(fields.keys() - ROPE_FIELDS[kinds[0]] - {"rope_type", "type", "rope_theta"}):
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
