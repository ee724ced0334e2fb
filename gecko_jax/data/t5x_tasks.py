"""Importing this module registers the mixtures and tasks of the table with seqio.

In a gin file of t5x:

    from gecko_jax.data import t5x_tasks
    MIXTURE_OR_TASK_NAME = "quickstart"

It takes every task whose files are there, in the default text format and with the
bundled vocabulary. For another vocabulary, import a module of your own that calls
`registration.register("gecko_finetune", vocabulary_path="t5.model", extra_ids=100)`.
"""

from gecko_jax.data import mixtures, registration


def _register() -> None:
    for name in mixtures.MIXTURES:
        rows, _ = mixtures.describe(name)
        for row in map(mixtures.locate, rows):
            if row.files:
                registration.register(row.name)
        if all(mixtures.locate(row).files for row in rows):
            registration.register(name)


_register()
