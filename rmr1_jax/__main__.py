"""`python -m rmr1_jax` is `rmr1`."""

import sys

from rmr1_jax.cli import main

sys.exit(main())
