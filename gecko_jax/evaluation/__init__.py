"""Evaluation: what a model is worth, on files of one's own and on MTEB.

    results = evaluation.evaluate(embedding.load("runs/finetune"), ["quickstart"])
    print(evaluation.format_table(results))

`sets` reads the files, `judgements` checks what their qrels mean, `judge` scores them,
`tables` prints the scores. MTEB runs
through `suites`: `encoder` is what mteb asks for texts, `store` keeps the vectors,
`local_tasks` shows our sets to mteb, `scoreboard` sets the scores beside published
ones.
"""

from gecko_jax.evaluation import judge, tables

evaluate = judge.evaluate
build_callback = judge.build_callback
format_table = tables.format_table
read = tables.read
save = tables.save
