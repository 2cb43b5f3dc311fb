"""Makes `python -m rmr1_jax` the same as the command `rmr1`."""

import sys

from rmr1_jax.cli.main import main

sys.exit(main())
