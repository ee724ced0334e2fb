"""Formats: every checkpoint and model folder that is read or written.

detection                     finds the format of a source and opens it
model_folder                  the package's own format: safetensors and JSON
checkpoints                   training checkpoints (Orbax)
averaging                     averages of checkpoints or models
pretrained                    the bundled models, by name
from_*, to_*                  T5X, Hugging Face, sentence-transformers, ONNX, hub
tokenizer                     the vocabulary of a Hugging Face folder
parameters, names             parameter trees, and the table of their names
tensors, arrays,
msgpack_arrays, kvstores      tensors on disk or behind a URL, read one at a time
model_card                    the card of an exported model
"""
