"""`python -m lcm_jax.cli`."""

import sys

from lcm_jax.cli.main import main

sys.exit(main())
