"""FRet: training data distilled from a language model (section 3.2).

    passages -> generate -> retrieve -> likelihood -> relevance -> fuse -> export

The model reads a *seed passage* and writes a task and a query; a retriever finds the
*candidates*; the same model judges each of them twice (QL, RC); the fused ranks name
the positive and the hard negative. `run` reads top to bottom; `docs/fret.md` shows the
files of every stage.
"""
