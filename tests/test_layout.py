"""The rooms of the package: imports go down, and heavy imports stay in their rooms."""

import ast
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "gecko_jax"

# Room -> floor. A folder is one room.
FLOORS = {
    "io": 0,
    "models": 0,
    "parallel": 0,
    "config": 1,
    "losses": 1,
    "text": 1,
    "formats": 2,
    "data": 3,
    "inference": 3,
    "llm": 3,
    "training": 4,
    "compile": 5,
    "plots": 5,
    "evaluation": 6,
    "fret": 7,
    "cli": 8,
    "__main__": 9,
}

# Module -> the rooms that may import it anywhere in a file.
ROOMS_OF = {
    "tensorflow": {"data"},
    "tensorflow_datasets": {"data"},
    "seqio": {"data"},
    "flax.linen": {"models", "training"},
    "t5x": {"training"},
    "torch": set(),
    "transformers": set(),
    "sentence_transformers": set(),
    "argparse": {"cli"},
    "apache_beam": {"data", "fret"},
}

# Slow or optional imports, which must be inside the function that needs them.
ONLY_INSIDE_FUNCTIONS = (
    "tensorflow",
    "tensorflow_datasets",
    "seqio",
    "grain",
    "matplotlib",
    "bm25s",
    "Stemmer",
    "tensorboardX",
    "rich",
    "mteb",
    "datasets",
    "huggingface_hub",
    "sklearn",
    "gguf",
    "tokenizers",
    "apache_beam",
)

FILES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _room(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imports(path: pathlib.Path) -> list[tuple[str, ast.AST, bool]]:
    """Lists (module, node, whether at the top level) of every import.

    `from a import b` counts as `a.b`. Imports for the type checker only are left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, child, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                found.extend(
                    (f"{module}.{alias.name}", child, top) for alias in child.names
                )
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            visit(child, top and not function)

    visit(tree, True)
    return found


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_room_has_a_floor():
    rooms = {_room(path) for path in FILES} - {"__init__"}
    assert rooms <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_run_down_or_sideways(path):
    room = _room(path)
    if room == "__init__":
        return
    for module, node, _ in _imports(path):
        if not _is_within(module, "gecko_jax") or module == "gecko_jax":
            continue
        other = module.split(".")[1]
        if other not in FLOORS:  # such as gecko_jax.__version__
            continue
        assert FLOORS[other] <= FLOORS[room], (
            f"{_name(path)}:{node.lineno}: {room} (floor {FLOORS[room]}) imports "
            f"{other} (floor {FLOORS[other]})"
        )


def test_no_two_rooms_import_each_other():
    below: dict[str, set[str]] = {}
    for path in FILES:
        names = {m.split(".")[1] for m, _, _ in _imports(path) if "gecko_jax." in m}
        below.setdefault(_room(path), set()).update(names & FLOORS.keys())
    below.pop("__init__")  # may load any room, lazily

    def reach(room: str, seen: set[str]) -> set[str]:
        for other in below.get(room, set()) - seen - {room}:
            seen.add(other)
            reach(other, seen)
        return seen

    for room in below:
        for other in reach(room, set()) - {room}:
            assert room not in reach(other, set()), f"{room} and {other} are a circle"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_heavy_things_stay_in_their_rooms(path):
    for module, node, top in _imports(path):
        place = f"{_name(path)}:{node.lineno}"
        for heavy, rooms in ROOMS_OF.items():
            assert not _is_within(module, heavy) or _room(path) in rooms, (
                f"{place}: {heavy} belongs in {sorted(rooms) or 'no room'}"
            )
        if top:
            assert not any(_is_within(module, m) for m in ONLY_INSIDE_FUNCTIONS), (
                f"{place}: import {module} inside the function that needs it"
            )


@pytest.mark.parametrize("path", [*FILES, *CONFIGS], ids=_name)
def test_own_modules_are_imported_whole(path):
    functions = {
        "gecko_jax.config.parse_arg",  # reads as a word of the config language
        "gecko_jax.data.load_seqio",  # defined by the folder itself
        # The menu of the package.
        "gecko_jax.evaluation.judge.evaluate",
        "gecko_jax.inference.embedding.Gecko",
        "gecko_jax.inference.embedding.load",
        "gecko_jax.training.loop.train",
    }
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        place = f"{_name(path)}:{node.lineno}"
        assert node.level == 0, f"{place}: a relative import"
        assert all(alias.name != "*" for alias in node.names), f"{place}: import *"
        if not _is_within(node.module or "", "gecko_jax"):
            continue
        folder = ROOT.joinpath(*(node.module or "").split("."))
        for alias in node.names:
            is_module = (folder / f"{alias.name}.py").exists()
            is_folder = (folder / alias.name / "__init__.py").exists()
            is_known = f"{node.module}.{alias.name}" in functions
            assert is_module or is_folder or is_known, (
                f"{place}: import the module, not {alias.name}"
            )


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_only_the_top_floor_prints(path):
    if _room(path) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_print = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        assert not is_print, f"{_name(path)}:{node.lineno}: print"


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_configs_import_only_what_describes_a_run(path):
    allowed = (
        "ml_collections",
        "gecko_jax.config",
        "gecko_jax.fret.settings",
    )
    for module, node, _ in _imports(path):
        assert any(_is_within(module, name) for name in allowed), (
            f"{_name(path)}:{node.lineno}: a config may import only {allowed}"
        )


def test_no_room_is_called_utils():
    vague = {"utils", "util", "misc", "helpers", "common", "manager"}
    assert not vague & {path.stem for path in FILES}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_corpus(tmp_path):
    pytest.importorskip("build", reason="needs gecko-jax[dev]")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in PACKAGE.rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and "__pycache__" not in name:
            assert name in names
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)
