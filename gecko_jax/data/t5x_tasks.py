"""Importing this module registers the table's mixtures and tasks with seqio.

In a gin file of t5x:

    from gecko_jax.data import t5x_tasks
    MIXTURE_OR_TASK_NAME = "quickstart"

It registers every task whose files exist, in the default text format and with the
bundled vocabulary. For another vocabulary, import a module of your own that calls
`registration.register("gecko_finetune", vocabulary_path="t5.model", extra_ids=100)`.
"""

from gecko_jax.data import mixtures, registration

for name in mixtures.MIXTURES:
    rows = [mixtures.locate(row) for row in mixtures.describe(name)[0]]
    for row in rows:
        if row.files:
            registration.register(row.name)
    if all(row.files for row in rows):
        registration.register(name)
