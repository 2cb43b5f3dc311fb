"""The tokenizer and the rows that the tests of prepared sets share."""

from pathlib import Path

import pytest
from prepared import rows, write_rows

from rmr1_jax.model.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(world_tokenizer) -> Tokenizer:
    return Tokenizer(world_tokenizer)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A file of 150 rows with traces."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows(150))
