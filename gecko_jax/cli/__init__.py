"""The command `gecko`: one module per verb.

A verb turns its options into calls of the package and prints the results to stdout;
progress and log messages go to stderr. A verb imports JAX only when it runs, so that
`gecko --help` does not need it.
"""
