"""A seeded mutator of JSON values, JSON text and bytes, and a check of their readers.

A reader of a mutant must return, or raise a `ValueError` or an `OSError` with a clear
message. It must not raise another error, hang, or allocate the memory that a damaged
header claims.
"""

import copy
import io
import json
import resource
import time
import warnings
import zipfile

import numpy as np

HOSTILE = (
    "x\n\n---\nlicense: mit\n---\n# INJECTED\n<script>alert(1)</script> "
    "[y](javascript:alert(1)) | cell | `code` ``` \x1b[31m \x9b31m \u202e\ngecko: error"
)
ODD = (
    *(None, True, False, 0, -1, 1, 2.5, -0.0, 10**400, -(10**400), 2**63, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "\ud800", "\x1b[31m"),
    *([], [None], [[]], {}, {"a": 1}, [0] * 50, "9" * 5_000, HOSTILE),
)


def places(value, path=()):
    """Returns every path within a JSON value."""
    yield path
    if isinstance(value, dict):
        for name, part in value.items():
            yield from places(part, (*path, name))
    elif isinstance(value, list):
        for number, part in enumerate(value[:4]):
            yield from places(part, (*path, number))


def mutate(value, rng):
    """Returns a copy with one change."""
    value = copy.deepcopy(value)
    path = rng.choice(list(places(value))[1:] or [()])
    if not path:
        return rng.choice(ODD)
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    kind = rng.random()
    if kind < 0.2:
        del parent[path[-1]]
    elif kind < 0.3 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[path[-1]]))
    elif kind < 0.3:
        parent["unknown"] = rng.choice(ODD)
    elif kind < 0.4 and type(parent[path[-1]]) in (int, float):
        parent[path[-1]] *= rng.choice((-1, 2, 1_000, 10**12))
    else:
        parent[path[-1]] = rng.choice(ODD)
    return value


def mutate_text(value, rng):
    """Returns JSON text with one change of its value, or sometimes of a character."""
    kind = rng.random()
    text = json.dumps(mutate(value, rng) if kind < 0.85 else value)
    if kind >= 0.95:
        return text[: rng.randrange(len(text))]
    if kind >= 0.9:
        place = rng.randrange(len(text))
        return text[:place] + rng.choice('{}[]",:0x') + text[place + 1 :]
    return text if kind < 0.87 else "[" * 5_000 + text + "]" * 5_000


def mutate_lines(content, rng):
    """Returns JSON lines with one line changed."""
    lines = content.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = mutate_text(json.loads(lines[place]), rng)
    return "\n".join(lines) + "\n"


def mutate_bytes(content, rng):
    """Returns a copy with some bytes changed, removed or added."""
    content = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0 and content:
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 1:
        del content[rng.randrange(len(content) + 1) :]
    elif kind == 2:
        begin = rng.randrange(len(content) + 1)
        content[begin:begin] = rng.randbytes(rng.randrange(1, 9))
    else:
        begin = rng.randrange(len(content) + 1)
        del content[begin : begin + rng.randrange(1, 9)]
    return bytes(content)


def end_well(act, what, errors=(ValueError,), seconds=5.0):
    """Runs `act`, which must return or raise an error with a clear message.

    Returns:
        What `act` returned, or None after an error.
    """
    begin, told, result = time.monotonic(), "an error without words", None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = act()
    except errors as error:
        told = str(error)
    assert told, what
    assert time.monotonic() - begin < seconds, what
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 1 << 20, what  # KiB: 1 GiB
    return result


def mutate_array(content, rng):
    """Returns an .npy file with another shape or dtype, or with other bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(content, rng)
    header = {
        "descr": rng.choice(
            ("<f4", "<f8", "|O", "<U9", "|S5", "<M8[s]", "<c16", "|V8")
        ),
        "fortran_order": rng.random() < 0.5,
        "shape": rng.choice(
            ((), (0,), (3,), (1, 16), (9, 16), (2**31, 16), (2**62, 4), (9, 2, 8))
        ),
    }
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content[128:]


def mutate_archive(content, rng):
    """Returns an .npz file with a changed, missing or highly compressed member."""
    kind = rng.random()
    if kind < 0.3:
        return mutate_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    if kind < 0.4:
        del members[name]
    elif kind < 0.5:
        members[name] += bytes(1 << 24)
    else:
        members[name] = mutate_array(members[name], rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def mutate_tensors(content, rng):
    """Returns a safetensors file with another header, or other bytes."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        return mutate_bytes(content[: 8 + size], rng) + content[8 + size :]
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.random()
    if kind < 0.4:
        other = rng.choice((*names, "", "a/b", "../x", "encoder", HOSTILE, "x" * 5_000))
        header[other] = header.pop(name)
    else:
        header = mutate(header, rng)
    encoded = json.dumps(header).encode()
    size = rng.choice((len(encoded),) * 9 + (2**40,))
    return size.to_bytes(8, "little") + encoded + content[8 + size :]


def mutate_file(path, rng):
    """Replaces a file by a mutant."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        text = content.decode()
        change = mutate_lines(text, rng) if path.suffix == ".jsonl" else None
        path.write_text(change or mutate_text(json.loads(text), rng))
        return
    change = {
        ".npy": mutate_array,
        ".npz": mutate_archive,
        ".safetensors": mutate_tensors,
    }.get(path.suffix, mutate_bytes)
    path.write_bytes(change(content, rng))
