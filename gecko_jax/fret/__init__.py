"""FRet: training data distilled from a language model (section 3.2).

    passages -> generate -> retrieve -> likelihood -> relevance -> fuse -> export

The model reads a *seed passage* and writes a task and a query. A retriever finds the
*candidates*, the model judges each of them twice (QL, RC), and the fused ranks select
the positive and the hard negative. `runs` reads top to bottom; `docs/fret.md` shows the
files of every stage.
"""
