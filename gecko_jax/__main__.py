"""`python -m gecko_jax` is `gecko`."""

from gecko_jax import cli

if __name__ == "__main__":
    cli.run()
