"""Inference with a trained model.

embedding      `Gecko`: encodes texts as normalized vectors
vector_files   embeds a file of texts shard by shard
vector_index   exact search over vectors
passage_lines  ids, titles and texts of an index on disk
quantization   int8 and binary vectors
ranking        nDCG and other metrics; BM25
hybrid         BM25 and vectors, fused by rank
cached_index   an index of files and folders, built at the first search
"""
