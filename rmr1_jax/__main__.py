"""`python -m rmr1_jax` is `rmr1`."""

import sys

from rmr1_jax.cli.main import main

sys.exit(main())
