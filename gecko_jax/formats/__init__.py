"""Formats: every checkpoint and model folder that is read or written.

detection                     finds the format of a source and opens it
model_folder, model_json      the package's own format: safetensors and JSON
checkpoints                   training checkpoints (Orbax)
averaging                     averages of checkpoints or models
pretrained                    bundled models, by name
from_*, to_*                  T5X, Hugging Face, sentence-transformers, ONNX
hub                           downloads from and uploads to the Hugging Face hub
model_card                    the card of an exported model
tokenizer, tokenizer_json,
added_tokens                  the vocabulary of a Hugging Face folder
parameters, names             parameter trees, and the table of their names
tensors                       tensors that are read one at a time
safetensors_files, kvstores,
msgpack_files, source_files   files that hold tensors and settings, local or remote
"""
