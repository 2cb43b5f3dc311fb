"""Reasoning reward models in JAX: a judge writes a Chain-of-Rubrics trace, then names the better of two answers.

    import rmr1_jax as rmr1

    judge = rmr1.Judge(rmr1.load("path/or/hub-id"), prompt="cor")
    judge.compare("What is 2 + 3?", "It is 5.", "It is 6.").winner

These names are the public API; each is imported when it is first used. Training is in `rmr1_jax.train`, the readers of
preference data in `rmr1_jax.pairs`, the command line in `rmr1_jax.cli`. Every room has a README.md.
"""

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rmr1_jax.judge.judge import Judge
    from rmr1_jax.judge.judgement import Judgement
    from rmr1_jax.policy import Completion, Policy, load

__all__ = ["Completion", "Judge", "Judgement", "Policy", "load"]

_MODULES = MappingProxyType(
    {
        "Completion": "policy",
        "Judge": "judge.judge",
        "Judgement": "judge.judgement",
        "Policy": "policy",
        "load": "policy",
    }
)


def __getattr__(name: str):
    if name == "__version__":
        from rmr1_jax.files.write import package_version

        return package_version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
