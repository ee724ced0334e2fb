"""The command `gecko`: one module per verb.

A verb turns options into calls of the package and prints the results to stdout;
progress and notes go to stderr. Imports that need JAX happen when a verb runs.
"""
