"""The verbs of `gecko`, a file each: help, options, and what the verb does.

Options go in, calls into the package are made, results are printed: to stdout, while
progress and notes go to stderr. What needs JAX is imported when a verb runs.
"""
