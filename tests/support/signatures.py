"""The checker of the shapes and types in signatures, for jaxtyping's import hook in `conftest.py`."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float
