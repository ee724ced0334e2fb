r"""Prompt files: versioned templates that untrusted texts cannot forge.

A prompt file is TOML with an instruction, a template of an example, and examples:

    version = 1
    kind = "generate"
    markers = ["Passage:", "Task:", "Query:"]
    instruction = "Read the passage ..."
    example = "Passage: {passage}\nTask: {task}\nQuery: {query}"
    answer = "Task:"                where the last example ends
    [[examples]]
    passage = "..."

A rendered prompt is the instruction, some examples and the open example, separated by
blank lines. Texts are put on one line, and the markers of the template and the special
tokens of chat templates are broken up in them.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.text import text_formats

FOLDER = pathlib.Path(__file__).parent / "prompt_files"

# Kind -> fields of an example before and in the answer.
_FIELDS = {
    "generate": ({"passage"}, {"task", "query"}),
    "generate_for_task": ({"passage", "task"}, {"query"}),
    "likelihood": ({"passage"}, {"query"}),
    "relevance": ({"passage", "query"}, {"label"}),
}
_SEPARATOR = "\n\n"
# Special tokens of chat templates, which servers interpret in prompts.
_SPECIAL = re.compile(
    r"<(?=[|｜])|<(?=<?/?(?:s|bos|eos|pad|unk|mask|unused\d+|SYS|"
    r"(?:start|end)_of_(?:turn|image))>)|"
    r"\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])"
)
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b-\u200f\u2028-\u202e\ufeff]"
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt file."""

    name: str  # name of the file without its suffix
    version: int  # version, recorded with every row
    sha256: str  # checksum of the file
    kind: str  # "generate", "generate_for_task", "likelihood" or "relevance"
    instruction: str  # first paragraph; may be empty
    example: str  # template of an example
    answer: str  # marker after which the model continues
    markers: tuple[str, ...]  # strings that are broken up in texts
    examples: tuple[Mapping[str, str], ...]  # field values of the examples
    labels: Mapping[str, int]  # relevance only: label -> grade, best first

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies the prompt in hashes and records."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The distinct task descriptions of the examples."""
        return tuple(dict.fromkeys(e["task"] for e in self.examples if "task" in e))

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        if self.kind == "generate_for_task":
            return ("\n",)
        return (_SEPARATOR, f"\n{self.markers[0]}")

    def choose(self, count: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Draws indices of a row's few-shot examples, of different tasks if possible.

        A count of 0, or one that is too large, takes all examples in their order.
        """
        if not 0 < count < len(self.examples):
            return tuple(range(len(self.examples)))
        seen: set[str] = set()
        first, rest = [], []
        for index in map(int, rng.permutation(len(self.examples))):
            task = self.examples[index].get("task", str(index))
            (rest if task in seen else first).append(index)
            seen.add(task)
        return tuple((first + rest)[:count])

    def render(self, shots: Sequence[int], **fields: str) -> str:
        """Returns a prompt that ends where the model continues.

        `shots` are indices of examples; `fields` are the texts of the open example,
        which are neutralized here.
        """
        parts = [self.instruction] if self.instruction else []
        parts += [_fill(self.example, self.examples[shot]) for shot in shots]
        clean = {name: self.neutralize(value) for name, value in fields.items()}
        head, _, _ = self.example.partition(self.answer)
        return _SEPARATOR.join([*parts, _fill(head, clean) + self.answer])

    def neutralize(self, content: str) -> str:
        """Returns a text on one line without markers and special tokens."""
        line = text_formats.clean(_INVISIBLE.sub(" ", content))
        line = _SPECIAL.sub(lambda match: f"{match[0]} ", line)
        for marker in self.markers:
            broken = f"{marker[:-1]} {marker[-1]}"
            line = re.sub(re.escape(marker), lambda _, b=broken: b, line, flags=re.I)
        return line


def before_query(prompt: Prompt) -> Prompt:
    """Returns a relevance prompt that ends before the query, to score the query (QL).

    Both judges then read the same text, so a model in this process reads it once.
    Raises ValueError if the query is not on a line of its own after the passage.
    """
    head, _, tail = prompt.example.partition("{query}")
    answer = head.rpartition("\n")[2].rstrip()
    if "{passage}" not in head or not answer or not tail.startswith("\n"):
        raise ValueError(
            f"{prompt.name}: likelihood.prompt needs {{query}} at the end of a line, "
            "after {passage}; change the example, or name another prompt"
        )
    return dataclasses.replace(prompt, kind="likelihood", answer=answer)


def load(name: str | os.PathLike, kinds: Sequence[str]) -> Prompt:
    """Reads and checks a prompt file: a bundled one, such as "generate", or a path."""
    path = pathlib.Path(name)
    if not path.suffix:
        path = FOLDER / f"{name}.toml"
    try:
        content = path.read_bytes()
    except OSError:
        bundled = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise ValueError(
            f"{name}: no such prompt; choose one of {bundled}, or the path of a .toml"
        ) from None
    try:
        values = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error}); correct it") from error
    return parse(path.stem, values, hashlib.sha256(content).hexdigest(), kinds)


def parse(
    name: str, values: Mapping[str, Any], sha256: str, kinds: Sequence[str]
) -> Prompt:
    """Checks the values of a prompt file; see `load`."""
    kind = values.get("kind")
    if kind not in kinds or kind not in _FIELDS:
        raise ValueError(f"{name}: kind={kind!r}; it must be {' or '.join(kinds)}")
    errors = [*_find_template_errors(kind, values), *_find_example_errors(kind, values)]
    if errors:
        raise ValueError(f"the prompt {name} has errors:\n  " + "\n  ".join(errors))
    labels = values.get("labels", {})
    return Prompt(
        name=name,
        version=values["version"],
        sha256=sha256,
        kind=kind,
        instruction=values.get("instruction", "").strip(),
        example=values["example"],
        answer=values["answer"],
        markers=tuple(values["markers"]),
        examples=tuple(values.get("examples", [])),
        labels=dict(sorted(labels.items(), key=lambda item: -item[1])),
    )


def _fill(template: str, fields: Mapping[str, str]) -> str:
    """Fills all fields in one pass, since a text may itself hold "{query}"."""
    return re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], template)


def _find_template_errors(kind: str, values: Mapping[str, Any]) -> Iterator[str]:
    known = {field.name for field in dataclasses.fields(Prompt)} - {"name", "sha256"}
    yield from (f"unknown field {key!r}" for key in values if key not in known)
    if type(values.get("version")) is not int:
        yield "version must be a whole number"
    if not isinstance(values.get("instruction", ""), str):
        yield "instruction must be a string"
    example, answer = values.get("example"), values.get("answer")
    if not isinstance(example, str) or not isinstance(answer, str) or not answer:
        yield "example and answer must be strings"
        answer = None
    elif example.count(answer) != 1:
        yield f"example must hold the answer's marker {answer!r} once"
    else:
        head, _, tail = example.partition(answer)
        for part, fields in zip((head, tail), _FIELDS[kind], strict=True):
            names = sorted(re.findall(r"\{(\w+)\}", part))
            if names != sorted(fields):
                yield f"{part!r} must hold each of {sorted(fields)} once, has {names}"
        if head and not head.endswith("\n"):
            yield f"{answer!r} must begin a line"
        if answer[-1].isspace():
            yield f"{answer!r} must not end in a space, with which the answer begins"
    markers = values.get("markers")
    if not markers or not all(isinstance(m, str) and len(m) > 1 for m in markers):
        yield "markers must be strings of two characters or more"
    elif answer is not None and answer not in markers:
        yield f"markers must hold {answer!r}"


def _find_example_errors(kind: str, values: Mapping[str, Any]) -> Iterator[str]:
    labels = values.get("labels", {})
    fields = set.union(*_FIELDS[kind])
    for number, entry in enumerate(values.get("examples", [])):
        if not isinstance(entry, dict) or set(entry) != fields:
            yield f"examples[{number}] must hold {sorted(fields)}"
        elif not all(isinstance(v, str) and v.strip() for v in entry.values()):
            yield f"examples[{number}] must hold texts that are not empty"
        elif labels and entry["label"] not in labels:
            yield f"examples[{number}]: {entry['label']!r} is not a label"
    if kind != "relevance":
        return
    if not isinstance(labels, dict) or len(labels) < 2:
        yield "labels must hold two labels or more, each with its grade"
    elif not all(type(grade) is int for grade in labels.values()):
        yield "the grades of labels must be whole numbers"
    else:
        if len(set(labels.values())) < len(labels):
            yield "the grades of labels must differ"
        # Their first tokens distinguish them, and may be as short as a letter.
        if len({label[:1].lower() for label in labels}) < len(labels):
            yield "labels must begin with different letters"
