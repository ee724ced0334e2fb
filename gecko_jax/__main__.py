"""`python -m gecko_jax` is `gecko`."""

import sys

from gecko_jax import cli

if __name__ == "__main__":
    sys.exit(cli.main())
