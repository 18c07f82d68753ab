"""The house keeps its order: imports run downwards, each heavy library has one home, nothing grows too large."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "clipkit").rglob("*.py"))
JOBS = [path for folder in ("train", "index", "eval") for path in sorted((ROOT / folder).glob("*.py"))]

# A module may import modules of lower floors, and of its own floor where the package says so.
FLOORS = [
    {"checksums", "errors", "hardware", "renewal", "stopping", "step", "products"},
    {
        "log",
        "artifact",
        "decode",
        "preprocess",
        "settings",
        "config",
        "ranking",
        "loss",
        "optim",
        "scenes",
        "report",
        "figures",
        "relevance",
    },
    {
        "average_precision",
        "cache",
        "decisions",
        "labels",
        "sorting",
        "checkpoint_files",
        "choice",
        "confidence",
        "guard",
        "heap",
        "launch",
        "metrics",
        "order",
        "storage",
        "cli",
        "augment",
        "shrink",
        "parallel",
        "weights",
        "filters",
        "sheet",
    },
    {
        "tar_index",
        "lists",
        "model_specs",
        "calibration",
        "linear_probe",
        "metrics_compat",
        "sort_journal",
        "comparison",
    },
    {"spool", "shard_specs", "placing", "few_shot", "measuring", "fusion_probe"},
    {"shards", "attention_probe"},
    {"sources", "towers"},
    {"pack", "embeddings", "trainset", "checkpoint", "phases"},
    {"streams", "processes", "check", "gpu_decode", "teacher", "reuse", "inference"},
    {"loader", "pixels", "explanation"},
    {"encoding", "search", "run", "objective"},
    {"embed", "zeroshot", "ranks", "questions", "stored"},
    {"lazy_model", "benchmarks", "served"},
    {"cached", "instances"},
    {"shared_work"},
    {"evaluation", "classification", "learner", "pace"},
    {"examples", "ablation", "probe_data"},
    {"classifiers", "probes"},
    {"validation", "classify_report", "classify_sort", "results", "plan"},
    {"tasks", "baselines"},
    {"evaluation_report", "suites"},
]
SAME_FLOOR = {
    ("renewal", "errors"),
    ("config", "settings"),
    ("config", "preprocess"),
    ("figures", "artifact"),
    ("report", "artifact"),
    ("report", "figures"),
    ("optim", "settings"),
}
HOMES = {
    "faiss": {"search"},
    "webdataset": {"shards"},
    "braceexpand": {"shard_specs"},
    "open_clip": {"towers"},
    "transformers": {"towers"},
    "huggingface_hub": {"towers"},
    "accelerate": {"ranks"},
    "scipy": {"linear_probe"},
    "simplejpeg": {"decode"},
    "pillow_heif": {"decode"},
    "torchvision": {"gpu_decode"},
    "matplotlib": {"figures"},
    "rich": {"log"},
    "filelock": {"artifact", "spool"},
    "fsspec": {"storage"},
    "aiohttp": {"storage"},
    "yaml": {"config"},
    "click": {"cli", "train", "index", "eval"},
    "pydantic": {"config", "settings", "preprocess", "towers", "suites"},
    "PIL": {
        "decode",
        "preprocess",
        "shrink",
        "augment",
        "scenes",
        "report",
        "towers",
        "check",
        "sheet",
        "classify_report",
        "explanation",
    },
}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module == "clipkit":
                found |= {f"clipkit.{name.name}" for name in node.names}
    return found


def room(path: Path) -> str:
    """The module of the library, or the job's folder."""
    inside = path.relative_to(ROOT)
    return inside.parts[1].removesuffix(".py") if inside.parts[0] == "clipkit" else inside.parts[0]


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def test_every_module_has_a_floor():
    rooms = {room(path) for path in LIBRARY} - {"__init__", "__main__"}
    assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    for name in imports(path):
        if name.startswith("clipkit."):
            there = name.split(".")[1]
            if there not in (here, "__init__"):
                assert floor(there) < floor(here) or (here, there) in SAME_FLOOR, f"{here} imports {there}"


def test_jobs_import_the_library_only_and_nothing_imports_a_job():
    verbs = {path.stem for path in JOBS}
    for path in JOBS:
        for name in imports(path):
            assert name.split(".")[0] not in {"train", "index", "eval"}, path
            assert not (name + ".").startswith(("clipkit.train.", "clipkit.index.", "clipkit.eval.")), path
    for path in LIBRARY:
        for name in imports(path):
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
    users = {room(path) for path in LIBRARY + JOBS if any(name.split(".")[0] == library for name in imports(path))}
    assert users <= HOMES[library]
    assert users, f"{library} is not used"


def test_modules_stay_small():
    for path in LIBRARY:
        assert len(path.read_text().splitlines()) <= 400, path
    for path in JOBS:
        assert len(path.read_text().splitlines()) <= 250, path


def test_every_module_says_what_it_is_and_what_it_offers():
    for path in LIBRARY + JOBS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        if path in LIBRARY and path.name != "__main__.py":
            names = {
                t.id
                for node in tree.body
                if isinstance(node, ast.Assign)
                for t in node.targets
                if isinstance(t, ast.Name)
            }
            assert "__all__" in names, path


def public_definitions(path: Path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
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


def test_no_asserts_and_no_prints_in_the_library():
    for path in LIBRARY + JOBS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts; users' mistakes raise ClipkitError"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and path.name != "cli.py":
                raise AssertionError(
                    f"{path}:{node.lineno} prints; results go through log.emit, notes through log.note"
                )
