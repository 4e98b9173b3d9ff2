"""Which way imports may point: read from the source, lazy imports too."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "val", "detect", "export", "serve", "hubconf")
PLAIN = (
    "archives",
    "autobatch",
    "callbacks",
    "checkpoint",
    "cli",
    "devices",
    "downloads",
    "errors",
    "files",
    "log",
    "process",
)
GEOMETRY = ("boxes", "nms", "images", "tiles")
ROOMS = ("augmentations", "autoanchor", "dataloaders", "eval", "loggers", "loss", "media", "metrics", "plots", "tools")
# What scripts written for YOLOv5 import: on top of all, and for them alone
YOLOV5_NAMES = ("datasets", "general", "torch_utils")
FLOOR_OF_ROOM = {
    **{f"utils.{name}": 0 for name in PLAIN},
    **{f"utils.{name}": 1 for name in GEOMETRY},
    **{f"utils.{name}": 2 for name in ROOMS},
    "utils.train": 3,
    **{f"utils.{name}": 5 for name in YOLOV5_NAMES},
}
# Other people's scripts import these names from here; the module's `__getattr__` finds them where they are defined.
FORWARDING = ("models.common",)
TORCH_FREE = (
    *("utils.boxes", "utils.images", "utils.nms", "utils.tiles", "utils.process", "utils.media", "utils.plots.boxes"),
    *("models.backends", "models.inference.predictor", "service"),
)
# They need it by nature; load_backend imports them lazily.
TORCH_BACKENDS = ("models.backends.pytorch", "models.backends.tensorrt", "models.backends.torchscript")
TORCH = {"torch", "torchvision"}
DRAWING = {"matplotlib", "pandas", "seaborn"}


class Import(NamedTuple):
    """One imported module, and whether importing the file runs it."""

    module: str
    at_top: bool
    line: int


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files():
    files = [ROOT / f"{name}.py" for name in SCRIPTS]
    for folder in ("models", "utils", "service", "benchmarks"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return {module_name(path): path for path in files if path.exists()}


MODULES = source_files()


class ImportReader(ast.NodeVisitor):
    """Collects a file's imports, less those for type checkers, of a forwarding `__getattr__` and of `__main__`."""

    def __init__(self, module, path):
        self.module, self.package = module, module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.depth, self.found = 0, []
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_If(self, node):
        if not {"TYPE_CHECKING", "__name__"} & set(re.findall(r"\w+", ast.unparse(node.test))):
            self.generic_visit(node)

    def visit_FunctionDef(self, node):
        if node.name == "__getattr__" and self.depth == 0 and self.module in FORWARDING:
            return
        self.visit_body_run_later(node)

    def visit_AsyncFunctionDef(self, node):
        self.visit_body_run_later(node)

    def visit_Lambda(self, node):
        self.visit_body_run_later(node)

    def visit_body_run_later(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    def visit_Import(self, node):
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node):
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            self._add(submodule if submodule in MODULES else base, node)

    def visit_Call(self, node):
        name = ast.unparse(node.func)
        if name in ("importlib.import_module", "import_module", "__import__") and isinstance(
            node.args[0], ast.Constant
        ):
            self._add(node.args[0].value, node)
        self.generic_visit(node)

    def _add(self, module, node):
        self.found.append(Import(module, self.depth == 0, node.lineno))


IMPORTS = {module: ImportReader(module, path).found for module, path in MODULES.items()}


def ours(module):
    return [item for item in IMPORTS[module] if item.module in MODULES]


def room_of(module):
    return next((room for room in FLOOR_OF_ROOM if module == room or module.startswith(f"{room}.")), None)


def inside(module, packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def with_packages(module):
    """A module and the packages above it, whose `__init__.py` its import runs first."""
    parts = module.split(".")
    return [name for name in (".".join(parts[: end + 1]) for end in range(len(parts))) if name in MODULES]


def loaded_by(module):
    """Foreign packages that importing `module` loads, with the module of ours that does it."""
    loaded, waiting, seen = {}, with_packages(module), set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for item in IMPORTS[current]:
            if item.at_top and item.module in MODULES:
                waiting.extend(with_packages(item.module))
            elif item.at_top:
                loaded.setdefault(item.module.split(".")[0], f"{current}:{item.line}")
    return loaded


def test_the_reader_sees_lazy_relative_and_dynamic_imports(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        "from __future__ import annotations\nimport os\nfrom . import log\nfrom utils import files\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def work():\n    import cv2.dnn\n    importlib.import_module('pandas')\n"
    )
    found = {(item.module, item.at_top) for item in ImportReader("utils.sample", path).found}
    assert found == {
        ("__future__", True),
        ("os", True),
        ("utils.log", True),
        ("utils.files", True),
        ("cv2.dnn", False),
        ("pandas", False),
    }


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("utils.")])
def test_utils_point_down(module):
    room = room_of(module)
    if room is None:
        assert MODULES[module].name == "__init__.py", f"{module} belongs to no room: add it to the table on purpose"
        return
    for item in ours(module):
        where = f"{module}:{item.line} imports {item.module}"
        assert item.module.startswith("utils"), f"{where}: utils knows neither models nor scripts"
        assert FLOOR_OF_ROOM.get(room_of(item.module), 0) <= FLOOR_OF_ROOM[room], f"{where}: an arrow back up"


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "models"])
def test_models_use_utils_but_not_training(module):
    for item in ours(module):
        assert inside(item.module, ("models", "utils")), f"{module}:{item.line} imports {item.module}"
        assert not inside(item.module, ("utils.train",)), f"{module}:{item.line} imports {item.module}"


@pytest.mark.parametrize("module", [name for name in MODULES if inside(name, ("service",))])
def test_the_service_uses_models_and_utils_but_not_training(module):
    for item in ours(module):
        assert inside(item.module, ("models", "utils", "service")), f"{module}:{item.line} imports {item.module}"
        assert not inside(item.module, ("utils.train",)), f"{module}:{item.line} imports {item.module}"


@pytest.mark.parametrize("module", [name for name in MODULES if not inside(name, ("serve", "service"))])
def test_only_its_script_imports_the_service(module):
    wrong = [item for item in ours(module) if inside(item.module, ("service",))]
    assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "hubconf"])  # it is called from Python
def test_nobody_imports_a_script(module):
    wrong = [item for item in ours(module) if item.module in SCRIPTS]
    assert not wrong, f"{module} imports {wrong}"


def test_the_program_knows_neither_tests_nor_benchmarks():
    for module, found in IMPORTS.items():
        outside = ("tests",) if inside(module, ("benchmarks",)) else ("tests", "benchmarks")
        wrong = [item for item in found if inside(item.module, outside)]
        assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("module", [name for name in MODULES if FLOOR_OF_ROOM.get(room_of(name), 0) < 4])
def test_the_names_of_yolov5_are_for_scripts_alone(module):
    wrong = [item for item in ours(module) if FLOOR_OF_ROOM.get(room_of(item.module), 0) >= 4]
    assert not wrong, f"{module} imports {wrong}"


def test_there_is_no_circle():
    state, path = {}, []

    def visit(module):
        state[module] = "open"
        path.append(module)
        for item in ours(module):
            assert state.get(item.module) != "open", " -> ".join([*path[path.index(item.module) :], item.module])
            if item.module not in state:
                visit(item.module)
        path.pop()
        state[module] = "done"

    for module in MODULES:
        if module not in state:
            visit(module)


@pytest.mark.parametrize("package", ["utils", "models"])
def test_packages_run_nothing(package):
    body = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) <= 1 and all(isinstance(node, ast.Expr) for node in body), "a docstring at most"


@pytest.mark.parametrize(
    "module", [name for name in MODULES if inside(name, TORCH_FREE) and name not in TORCH_BACKENDS]
)
def test_the_edge_loads_no_torch(module):
    loaded = loaded_by(module)
    heavy = {name: where for name, where in loaded.items() if name in TORCH | DRAWING}
    assert not heavy, f"importing {module} loads {heavy}"
    drawing = [item for item in IMPORTS[module] if item.module.split(".")[0] in DRAWING]
    assert not drawing, f"{module} imports {drawing}"


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name in MODULES and name != "hubconf"])
def test_scripts_load_nothing_heavy(script):
    heavy = {name: where for name, where in loaded_by(script).items() if name in TORCH | DRAWING | {"cv2", "numpy"}}
    assert not heavy, f"importing {script} loads {heavy}"


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name in MODULES and name != "hubconf"])
def test_help_answers_without_torch(script):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}.py', '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "heavy = sorted({'torch', 'cv2', 'matplotlib', 'pandas'} & set(sys.modules))\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "usage:" in run.stdout
