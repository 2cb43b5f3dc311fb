"""The sampling that a model's makers recommend, from the generation_config.json beside its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rmr1_jax.config import build_config
from rmr1_jax.errors import InputError
from rmr1_jax.files.untrusted import read_object
from rmr1_jax.sampler.sample import SamplingConfig

DRAWING = ("temperature", "top_p", "top_k", "min_p")


def recommended_sampling(directory: str | Path) -> dict[str, Any]:
    """`temperature`, and those of `top_p`, `top_k` and `min_p` that the file sets, as arguments of `SamplingConfig`.

    `do_sample: false` is temperature 0. A temperature that is not named is 1, and a top_k of 0 or -1 keeps all tokens.
    Other keys, such as repetition_penalty, are not applied.

    Raises:
        InputError: there is no such file, a value is out of its range, or none of these keys is in it.
    """
    path = Path(directory) / "generation_config.json"
    advice = "set the temperature, top_p, top_k and min_p yourself"
    if not path.is_file():
        raise InputError(f"{path}: there is no such file to take the sampling from; {advice}")
    raw = read_object(path)
    values = {name: raw[name] for name in DRAWING if raw.get(name) is not None}
    if values.get("top_k") in (0, -1):
        values["top_k"] = None
    sampled = raw.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise InputError(f"{path}: do_sample: expected true or false (got {sampled!r})")
    if not values and sampled is not False:
        raise InputError(f"{path}: sets none of {', '.join(DRAWING)}; {advice}")
    config = build_config(SamplingConfig, values, source=str(path))
    if sampled is False or not config.temperature:
        return {"temperature": 0.0}
    return {"temperature": config.temperature, **config.given()}


def with_recommended_sampling(sampling: SamplingConfig, directory: str | Path) -> SamplingConfig:
    """`sampling` with the values of `recommended_sampling`.

    Raises:
        InputError: as `recommended_sampling`; or `sampling` sets one of the values to another than its default.
    """
    if own := [name for name in DRAWING if getattr(sampling, name) != getattr(SamplingConfig, name)]:
        raise InputError(
            f"sampling.{own[0]}={getattr(sampling, own[0])} is set, and generation_config=true takes "
            f"{', '.join(DRAWING)} from the model; leave one of the two out"
        )
    return dataclasses.replace(sampling, **recommended_sampling(directory))
