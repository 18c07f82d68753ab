"""The house keeps its order: rooms import lower floors only, each heavy library has one home, nothing grows too
large."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ROOT / "clipkit"
LIBRARY = sorted(TOP.rglob("*.py"))
STUBS = sorted(TOP.rglob("*.pyi"))
JOBS = [path for folder in ("train", "index", "eval") for path in sorted((ROOT / folder).glob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# A room imports rooms of lower floors and itself, never another one of its own floor; the jobs stand above all.
FLOORS = [
    {"core"},
    {"storage", "images", "metrics"},
    {"data", "models"},
    {"embedding"},
    {"search"},
    {"classification"},
    {"evaluation"},
    {"training", "serving"},
]
# Rooms or modules of them that may import a library; "jobs" are the folders train, index and eval.
HOMES = {
    "faiss": {"search"},
    "webdataset": {"data.shards.writer"},
    "braceexpand": {"data.shards.specs"},
    "open_clip": {"models"},
    "transformers": {"models"},
    "huggingface_hub": {"models.loading"},
    "accelerate": {"training.distributed"},
    "scipy": {"classification.logistic", "metrics.selective"},
    "simplejpeg": {"images.decoding"},
    "pillow_heif": {"images.decoding"},
    "torchvision": {"images.gpu_decode"},
    "matplotlib": {"core.figures"},
    "rich": {"core.log"},
    "filelock": {"storage.stage", "data.shards.download_cache"},
    "fsspec": {"storage.remote"},
    "aiohttp": {"storage.remote"},
    "yaml": {"core.settings", "training.recipe"},
    "click": {"cli", "options", "jobs"},
    "lazy_loader": {"faces"},
    "pydantic": {
        "core.settings",
        "images.preprocess",
        "images.augment",
        "models.settings",
        "models.loading",
        "models.openclip",
        "evaluation.suite",
        "training.settings",
        "training.recipe",
    },
    "PIL": {
        "core.html_report",
        "images",
        "data.synthetic",
        "data.check",
        "models",
        "search.page",
        "classification.page",
    },
}


def dotted(path: Path) -> str:
    """The module of a file, without ``clipkit.``; of the top face nothing."""
    parts = [*path.relative_to(TOP).parts[:-1], path.stem]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in LIBRARY}
FACES = {dotted(path): path for path in STUBS}  # the top, the rooms, and their sub-packages
ROOMS = {name for name in FACES if name and "." not in name}
# What has no room yet; the command and its options stand at the top.
FLAT = [name for name in MODULES if name.partition(".")[0] not in {"", "__main__", "cli", "options", *ROOMS}]


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS, 1) if room in rooms)


def package(module: str) -> str:
    """The room or sub-package that a module belongs to; of what has no room the top."""
    return max((name for name in FACES if module == name or module.startswith(f"{name}.")), key=len, default="")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[tuple[str, str | None], ...]:
    """What a file imports, anywhere in it: full names of modules, and the name that is taken from each."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += [(name.name, None) for name in node.names]
        elif isinstance(node, ast.ImportFrom) and path.suffix == ".pyi":
            here = f"clipkit.{dotted(path)}".rstrip(".")
            assert node.level == 1, f"{path}: a face hands on what is in its own package"
            found += [(f"{here}.{node.module}", name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(node.module or "", name.name) for name in node.names]
    return tuple(found)


def of_clipkit(path: Path) -> list[tuple[str, str | None]]:
    """What a file imports of clipkit: modules without ``clipkit.``; a module that is taken as a name stands in full."""
    found = []
    for module, name in imports(path):
        if (module + ".").startswith("clipkit."):
            inside = module[8:]
            whole = f"{inside}.{name}".lstrip(".")
            found.append((whole, None) if name is not None and whole in MODULES else (inside, name))
    return found


def handed_on(face: str) -> dict[str, str]:
    """The names of a face, with the module that each comes from."""
    return {name: module[8:] for module, name in imports(FACES[face]) if name is not None}


def libraries(path: Path) -> set[str]:
    return {module.partition(".")[0] for module, _ in imports(path)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_room_has_a_floor_and_the_top_stays_small():
    assert set().union(*FLOORS) >= ROOMS
    if not FLAT:
        assert len({path.stem for path in TOP.glob("*.py")} - {"__init__", "__main__"}) <= 3
        assert {path.name for path in TOP.iterdir() if path.is_dir() and any(path.glob("*.py"))} == ROOMS


@pytest.mark.parametrize("path", [*LIBRARY, *STUBS], ids=name_of)
def test_imports_run_downwards(path):
    here = dotted(path)
    room = here.partition(".")[0]
    if room not in ROOMS:
        return
    for module, _ in of_clipkit(path):
        there = module.partition(".")[0]
        assert there in ROOMS, f"{here} imports {module or 'the top'}, which is in no room"
        assert there == room or floor(there) < floor(room), f"{here} imports {module}"


@pytest.mark.parametrize("path", [*LIBRARY, *JOBS], ids=name_of)
def test_rooms_are_entered_by_their_faces(path):
    here = dotted(path) if path in LIBRARY else "jobs"
    for module, name in of_clipkit(path):
        there = package(module)
        if not there or here == there or here.startswith(f"{there}."):
            continue  # what is inside imports the modules themselves
        assert module == there, f"{here} imports {module}; the face is clipkit.{there}"
        if name is not None:
            assert name in handed_on(there), f"{here} imports {name}, which clipkit.{there} does not hand on"


def test_faces_hand_on_what_is_needed_outside():
    asked: dict[str, set[str]] = {}
    for path in [*LIBRARY, *JOBS]:
        here = dotted(path) if path in LIBRARY else "jobs"
        for module, name in of_clipkit(path):
            if name is not None and module in FACES and not (here == module or here.startswith(f"{module}.")):
                asked.setdefault(module, set()).add(name)
    for module in handed_on("").values():  # the top is for notebooks
        asked.setdefault(module, set()).update(name for name, m in handed_on("").items() if m == module)
    for face in FACES:
        if face:
            assert set(handed_on(face)) == asked.get(face, set()), face


@pytest.mark.parametrize("face", FACES)
def test_names_of_a_face_exist_and_hide_no_module(face):
    folder = FACES[face].parent
    inside = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    for name, module in handed_on(face).items():
        assert name not in inside, f"{name} is a module of clipkit.{face}, too: the module would take the name's place"
        there = handed_on(module) if module in FACES else definitions(MODULES[module])
        assert name in there, f"clipkit.{face} hands on {name}, which is not in {module}"


def definitions(path: Path, *, own: bool = False) -> set[str]:
    # What another library defines may be handed on, too.
    found = {name for module, name in imports(path) if name and not (own or (module + ".").startswith("clipkit."))}
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            found |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)} if target else set()
    return found


def test_no_circle_inside_a_room():
    edges: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if module.partition(".")[0] in ROOMS and module not in FACES:
            for there, name in of_clipkit(path):
                target = handed_on(there).get(name, there) if there in FACES and name is not None else there
                if target.partition(".")[0] == module.partition(".")[0] and target not in FACES:
                    edges.setdefault(module, set()).add(target)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way[way.index(module) :], module])
        if module not in done:
            for there in edges.get(module, ()):
                visit(there, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())


ALONE = """
import importlib, sys

class Refusing:
    below = set()
    def find_spec(self, name, path=None, target=None):
        parts = name.split(".")
        if parts[0] == "clipkit" and len(parts) > 1 and parts[1] not in self.below:
            raise AssertionError(f"{sys.argv[0]}: {name} is not below")

finder = Refusing()
sys.meta_path.insert(0, finder)
for line in sys.stdin:
    room, below, *modules = line.split()
    finder.below = set(below.split(","))
    for module in modules:
        sys.argv[0] = f"importing {module}"
        importlib.import_module(f"clipkit.{module}")
"""


def test_each_room_can_be_imported_without_those_above_it():
    lines = []
    for number, rooms in enumerate(FLOORS, 1):
        below = set().union(*FLOORS[: number - 1])
        for room in sorted(rooms & ROOMS):
            modules = [module for module in MODULES if (module + ".").startswith(f"{room}.")]
            lines.append(f"{room} {','.join([room, *below])} {' '.join(modules)}")
    code = subprocess.run([sys.executable, "-c", ALONE], input="\n".join(lines), capture_output=True, text=True)
    assert code.returncode == 0, code.stderr


def test_jobs_import_the_library_only_and_nothing_imports_a_job():
    verbs = {path.stem for path in JOBS}
    for path in JOBS:
        for name, _ in imports(path):
            assert name.split(".")[0] not in {"train", "index", "eval"}, path
            assert not (name + ".").startswith(("clipkit.train.", "clipkit.index.", "clipkit.eval.")), path
    for path in LIBRARY:
        for name, _ in imports(path):
            assert name.split(".")[0] not in {"train", "index", "eval"}, path
    # A job's own folder comes first on sys.path when it runs as a script: its name must hide no module.
    assert not verbs & {"inspect", "profile", "webdataset", "torch", "faiss", "click", "select", "queue", "token"}
    assert (
        not list(ROOT.glob("train/__init__.py"))
        + list(ROOT.glob("index/__init__.py"))
        + list(ROOT.glob("eval/__init__.py"))
    )


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library):
    users = {dotted(path) for path in LIBRARY if library in libraries(path)}
    users = {"faces" if user in FACES else user for user in users} - set(FLAT)
    users |= {"jobs" for path in JOBS if library in libraries(path)}
    at_home = {user for user in users for home in HOMES[library] if (user + ".").startswith(f"{home}.")}
    assert users == at_home
    if not FLAT:
        for home in HOMES[library]:
            assert any((user + ".").startswith(f"{home}.") for user in users), f"{home} does not use {library}"


def test_modules_stay_small():
    for path in LIBRARY:
        assert len(path.read_text().splitlines()) <= 400, path
    for path in JOBS:
        assert len(path.read_text().splitlines()) <= 260, path


# Longer than others may be: the loop of a training run is a program that one reads from top to bottom.
LONG_FUNCTIONS = {("train/train.py", "train")}


def test_functions_stay_short():
    found = {
        (name_of(path), node.name)
        for path in [*LIBRARY, *JOBS]
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 80
    }
    assert found <= LONG_FUNCTIONS


def test_no_public_name_is_defined_twice():
    """A name that a module offers says what it is, also to whoever finds it in two places."""
    homes: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        if module not in FACES:
            for name in offered(path) & definitions(path, own=True):
                homes.setdefault(name, []).append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def offered(path: Path) -> set[str]:
    """The names in ``__all__``."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


def test_every_module_says_what_it_is_and_what_it_offers():
    for path in LIBRARY + JOBS:
        assert ast.get_docstring(parsed(path)), path
        if path in LIBRARY and path.name != "__main__.py":
            names = {
                n.id
                for node in parsed(path).body
                if isinstance(node, ast.Assign)
                for target in node.targets
                for n in ast.walk(target)
                if isinstance(n, ast.Name)
            }
            assert "__all__" in names, path


def test_faces_are_lazy_and_say_what_to_read_first():
    for face in FACES:
        path = MODULES[face]
        _, *rest = parsed(path).body
        assert [ast.unparse(node) for node in rest] == [
            "import lazy_loader",
            "__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)",
        ], path
        if face:
            assert "Read `" in (ast.get_docstring(parsed(path)) or ""), path


def public_definitions(path: Path):
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def test_public_functions_and_classes_are_documented():
    missing = [
        f"{path.name}:{node.name}"
        for path in LIBRARY
        for node in public_definitions(path)
        if not ast.get_docstring(node)
    ]
    assert not missing


def test_tests_stand_in_the_rooms_that_they_prove():
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in TESTS if path.parent != ROOT / "tests"}
    assert folders <= {*ROOMS, "jobs", "bench"}


def test_packages_are_all_installed():
    """setup.cfg names each: a wheel once went without one of them."""
    named = (ROOT / "setup.cfg").read_text().split()
    for face in FACES:
        assert f"clipkit.{face}".rstrip(".") in named, face


def test_no_asserts_and_no_prints_in_the_library():
    for path in LIBRARY + JOBS:
        for node in ast.walk(parsed(path)):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts; users' mistakes raise ClipkitError"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and path.name != "cli.py":
                raise AssertionError(
                    f"{path}:{node.lineno} prints; results go through log.emit, notes through log.note"
                )
