"""Which way imports may point: read from the source, lazy imports too."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "val", "detect", "export", "serve", "hubconf")
FLOORS = [  # from the ground: imports go to the same floor or a lower one
    "utils.archives utils.autobatch utils.callbacks utils.checkpoint utils.cli utils.devices utils.downloads "
    "utils.energy utils.errors utils.files utils.log utils.process",
    "utils.boxes utils.images utils.nms utils.page utils.tiles",
    "utils.augmentations utils.autoanchor utils.dataloaders utils.loggers utils.loss utils.metrics utils.plots",
    "utils.eval utils.media utils.tools",
    "utils.train",
    "utils.datasets utils.general utils.torch_utils",
    "models.common models.heads models.raw",
    "models.config models.deploy",
    "models.yolo",
    "models.load",
    "models.backends",
    "models.inference models.experimental",
    "models.export models.transplant models.choose_neck models.latency",
    "service",
    "train val detect export serve hubconf",
    "benchmarks",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
OTHERS = ("utils.datasets", "utils.general", "utils.torch_utils", "models.experimental")  # for other people's scripts
USERS = {  # of what not everything above may import
    "utils.train": ("utils.train", "utils.torch_utils", "train", "benchmarks"),
    **dict.fromkeys(OTHERS, ("utils.general",)),
    "service": ("serve", "service"),
    **dict.fromkeys(SCRIPTS, ("hubconf",)),  # it is called from Python
    "benchmarks": ("benchmarks",),
    "tests": (),
}
TORCH_FREE = (
    *("utils.boxes", "utils.images", "utils.nms", "utils.tiles", "utils.process", "utils.media", "utils.plots.boxes"),
    *("models.raw", "models.backends", "models.inference.predictor", "service"),
)
# They need it by nature; load_backend imports them lazily.
TORCH_BACKENDS = tuple(f"models.backends.{name}" for name in ("executorch", "pytorch", "tensorrt", "torchscript"))
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
        if (self.module, node.name, self.depth) == ("models.common", "__getattr__", 0):
            return  # it finds names that other people's scripts import from here where they are defined
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


def floor_of(module):
    parts = module.split(".")
    return next((FLOOR[name] for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in FLOOR), None)


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


def test_imports_point_down():
    wrong = []
    for module, path in MODULES.items():
        floor = floor_of(module)
        assert floor is not None or path.name == "__init__.py", f"{module} has no floor: add it to the table on purpose"
        for item in IMPORTS[module]:
            above = floor is not None and (floor_of(item.module) or 0) > floor
            closed = [
                room for room, users in USERS.items() if inside(item.module, (room,)) and not inside(module, users)
            ]
            if above or closed:
                wrong.append(f"{module}:{item.line} imports {item.module}")
    assert not wrong, "\n".join(wrong)


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


def test_names_that_are_imported_exist():
    """Also inside functions, in benchmarks and in campaigns, where no other test may come by."""
    campaigns = {module_name(path): path for path in (ROOT / "tests" / "campaigns").glob("*.py")}
    known, wrong = {**MODULES, **campaigns}, []
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in known:
                names = [alias.name for alias in node.names if f"{node.module}.{alias.name}" not in known]
                source = importlib.import_module(node.module)
                missing = [name for name in names if name != "*" and not hasattr(source, name)]
                wrong += [f"{module}:{node.lineno}: {node.module} has no {name}" for name in missing]
    assert not wrong, "\n".join(wrong)


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
