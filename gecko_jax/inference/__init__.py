"""Inference: a trained model at work.

embedding      `Gecko`: texts in, normalized vectors out
vector_files   a file of texts, embedded shard by shard
vector_index   exact search over vectors
quantization   int8 and binary vectors
ranking        nDCG and other metrics; BM25
"""
