"""Evaluation of a model, on local files and on MTEB.

    results = evaluation.evaluate(embedding.load("runs/finetune"), ["quickstart"])
    print(evaluation.format_table(results))

`sets` reads the files, `judgements` checks their qrels, `judge` and `retrieval_scores`
compute the scores, and `tables` prints and saves them. `mteb_suites` runs MTEB:
`mteb_encoder` is the model that mteb calls, `vector_store` keeps the vectors,
`local_tasks` turns our sets into tasks of mteb, and `scoreboard` prints the scores next
to published ones.
"""

from gecko_jax.evaluation import judge, tables

evaluate = judge.evaluate
build_callback = judge.build_callback
format_table = tables.format_table
read = tables.read
save = tables.save
