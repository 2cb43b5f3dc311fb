"""Qwen as Flax NNX modules, and its checkpoints on disk. The modules are imported when they are first used."""

__all__ = ["Attention", "Block", "Mlp", "Qwen", "ScalarQwen"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rmr1_jax.model import qwen

    return getattr(qwen, name)
