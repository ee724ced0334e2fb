r"""Prompts: versioned files with strict templates, and texts that cannot forge them.

A prompt file is TOML: an instruction, the form of an example, and examples.

    version = 1
    kind = "generate"
    markers = ["Passage:", "Task:", "Query:"]
    instruction = "Read the passage ..."
    example = "Passage: {passage}\nTask: {task}\nQuery: {query}"
    answer = "Task:"                the last example ends where this begins
    [[examples]]
    passage = "..."

A rendered prompt is the instruction, some examples and the open one, a blank line
between. Texts are made one line, and the markers of the template and the special
tokens of chat templates are broken up in them: a line that begins with a marker is
ours.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.text import text_formats

FOLDER = pathlib.Path(__file__).parent / "prompt_files"

# What an example must hold besides its answer, and what the answer is made of.
_FIELDS = {
    "generate": ({"passage"}, {"task", "query"}),
    "generate_for_task": ({"passage", "task"}, {"query"}),
    "likelihood": ({"passage"}, {"query"}),
    "relevance": ({"passage", "query"}, {"label"}),
}
_SEPARATOR = "\n\n"
# The special tokens of chat templates, which servers read in prompts as such.
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
    """A prompt file.

    Attributes:
        name: Of the file, without its ending.
        version: Written beside every record.
        sha256: Of the file's bytes.
        kind: "generate", "generate_for_task", "likelihood" or "relevance".
        instruction: The first paragraph; may be empty.
        example: Template of an example.
        answer: Marker whose line the model continues.
        markers: Strings that no text may hold.
        examples: Values of the template's fields.
        labels: Of relevance: label -> grade, best first.
    """

    name: str
    version: int
    sha256: str
    kind: str
    instruction: str
    example: str
    answer: str
    markers: tuple[str, ...]
    examples: tuple[Mapping[str, str], ...]
    labels: Mapping[str, int]

    @property
    def facts(self) -> dict[str, Any]:
        """Names the prompt in hashes and records."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task descriptions of the examples, each once."""
        return tuple(dict.fromkeys(e["task"] for e in self.examples if "task" in e))

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer: its line, or what begins a next example."""
        if self.kind == "generate_for_task":
            return ("\n",)
        return (_SEPARATOR, f"\n{self.markers[0]}")

    def choose(self, count: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Draws the few-shot examples of a row, of different tasks while there are.

        Args:
            count: Examples; 0 or more than there are takes all, in their order.
            rng: Seeded by the row.

        Returns:
            Positions of the examples, in the order of the prompt.
        """
        if not 0 < count < len(self.examples):
            return tuple(range(len(self.examples)))
        order = rng.permutation(len(self.examples))
        seen: set[str] = set()
        first, rest = [], []
        for position in order:
            task = self.examples[position].get("task", str(position))
            (rest if task in seen else first).append(int(position))
            seen.add(task)
        return tuple((first + rest)[:count])

    def render(self, shots: Sequence[int], **fields: str) -> str:
        """Writes a prompt that ends where the model goes on.

        Args:
            shots: Positions of the examples.
            **fields: Texts of the open example; neutralized here.
        """
        parts = [self.instruction] if self.instruction else []
        parts += [fill(self.example, self.examples[shot]) for shot in shots]
        clean = {name: self.neutralize(value) for name, value in fields.items()}
        head = self.example[: self._begin_of_answer()]
        return _SEPARATOR.join([*parts, fill(head, clean) + self.answer])

    def neutralize(self, content: str) -> str:
        """Returns one line that holds neither a marker nor a special token."""
        line = text_formats.clean(_INVISIBLE.sub(" ", content))
        line = _SPECIAL.sub(lambda match: f"{match[0]} ", line)
        for marker in self.markers:
            broken = f"{marker[:-1]} {marker[-1]}"
            line = re.sub(re.escape(marker), lambda _, b=broken: b, line, flags=re.I)
        return line

    def _begin_of_answer(self) -> int:
        return self.example.index(self.answer)


def load(name: str | os.PathLike, kinds: Sequence[str]) -> Prompt:
    """Reads a prompt file and checks it.

    Args:
        name: Of a bundled file, such as "generate", or the path of one's own.
        kinds: What it may be.

    Raises:
        ValueError: No such file, or every rule that it breaks.
    """
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
        raise ValueError(f"{path}: not TOML ({error})") from error
    return parse(path.stem, values, hashlib.sha256(content).hexdigest(), kinds)


def parse(
    name: str, values: Mapping[str, Any], sha256: str, kinds: Sequence[str]
) -> Prompt:
    """Checks the values of a prompt file; see `load`."""
    kind = values.get("kind")
    if kind not in kinds or kind not in _FIELDS:
        raise ValueError(f"{name}: kind={kind!r}; it must be {' or '.join(kinds)}")
    known = {field.name for field in dataclasses.fields(Prompt)} - {"name", "sha256"}
    given, answered = _FIELDS[kind]
    example, answer = values.get("example"), values.get("answer")
    examples, markers = values.get("examples", []), values.get("markers", [])
    labels = values.get("labels", {})
    faults = [f"unknown field {key!r}" for key in values if key not in known]
    if type(values.get("version")) is not int:
        faults.append("version must be a whole number")
    if not isinstance(values.get("instruction", ""), str):
        faults.append("instruction must be a string")
    if not isinstance(example, str) or not isinstance(answer, str) or not answer:
        faults.append("example and answer must be strings")
    elif example.count(answer) != 1:
        faults.append(f"example must hold the answer's marker {answer!r} once")
    else:
        head, _, tail = example.partition(answer)
        for part, fields in ((head, given), (tail, answered)):
            found = sorted(re.findall(r"\{(\w+)\}", part))
            if found != sorted(fields):
                faults.append(
                    f"{part!r} must hold each of {sorted(fields)} once, has {found}"
                )
        if head and not head.endswith("\n"):
            faults.append(f"{answer!r} must begin a line")
        if answer[-1:].isspace():
            faults.append(f"{answer!r} must not end in a space: the answer begins so")
    if not markers or not all(isinstance(m, str) and len(m) > 1 for m in markers):
        faults.append("markers must be strings of two characters or more")
    elif isinstance(answer, str) and answer not in markers:
        faults.append(f"markers must hold {answer!r}")
    for number, entry in enumerate(examples):
        if not isinstance(entry, dict) or set(entry) != given | answered:
            faults.append(f"examples[{number}] must hold {sorted(given | answered)}")
        elif not all(isinstance(v, str) and v.strip() for v in entry.values()):
            faults.append(f"examples[{number}] must hold texts that are not empty")
        elif labels and entry["label"] not in labels:
            faults.append(f"examples[{number}]: {entry['label']!r} is not a label")
    faults += _label_faults(labels) if kind == "relevance" else []
    if faults:
        raise ValueError(f"the prompt {name} has faults:\n  " + "\n  ".join(faults))
    return Prompt(
        name=name,
        version=values["version"],
        sha256=sha256,
        kind=kind,
        instruction=values.get("instruction", "").strip(),
        example=str(example),
        answer=str(answer),
        markers=tuple(markers),
        examples=tuple(examples),
        labels=dict(sorted(labels.items(), key=lambda item: -item[1])),
    )


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Fills all fields in one pass: a text may itself hold "{query}"."""
    return re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], template)


def _label_faults(labels: Any) -> list[str]:
    if not isinstance(labels, dict) or len(labels) < 2:
        return ["labels must hold two labels or more, each with its grade"]
    if not all(type(grade) is int for grade in labels.values()):
        return ["the grades of labels must be whole numbers"]
    faults = []
    if len(set(labels.values())) < len(labels):
        faults.append("the grades of labels must differ")
    # They are told apart by their first token, which may be as short as a letter.
    if len({label[:1].lower() for label in labels}) < len(labels):
        faults.append("labels must begin with different letters")
    return faults
