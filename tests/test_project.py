"""What holds for the whole project: no unsafe calls, one source of randomness, documents that tell the truth."""

import ast
import importlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for pattern in ("*.py", "models/**/*.py", "utils/**/*.py", "service/**/*.py", "benchmarks/**/*.py")
    for path in ROOT.glob(pattern)
)
REQUIREMENTS = ("requirements.txt", "requirements-serve.txt")  # what may be imported at the top of a file
SEEDS_FOR_OTHERS = "utils/general.py"  # its init_seeds is what other people's scripts seed their own draws with
COMMAND = r"\bpython (\w+)\.py ([^\n`#|]*)"
READMES = ("README.md", "README.zh-CN.md")
UNSAFE_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load_all", "os.system"}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_no_unsafe_calls_and_no_swallowed_errors():
    trees = ((source, ast.parse(source.read_text(encoding="utf-8"))) for source in SOURCES)
    for source, node in ((source, node) for source, tree in trees for node in ast.walk(tree)):
        where = f"{relative(source)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            assert function not in UNSAFE_CALLS, where
            assert function != "torch.load" or "weights_only=True" in ast.unparse(node), where
            for keyword in node.keywords:
                setting = f"{keyword.arg}={ast.unparse(keyword.value)}"
                assert setting not in ("allow_pickle=True", "weights_only=False", "shell=True"), f"{where} {setting}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
            assert [type(item) for item in node.body] != [ast.Pass], f"{where}: an error is swallowed"


def test_random_numbers_come_from_generators():
    """No global generator of numpy or of the standard library is read or seeded."""
    allowed = "Generator|Philox|SeedSequence|BitGenerator|default_rng"
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        found = re.findall(rf"\bnp\.random\.(?!(?:{allowed})\b)\w+", text)
        found += re.findall(r"(?<![\w.])random\.(?!Random\b)\w+(?=\()", text)
        seeding = ["np.random.seed", "random.seed"] if relative(source) == SEEDS_FOR_OTHERS else []
        assert sorted(found) == seeding, f"{relative(source)}: {found}"


@pytest.mark.parametrize("readme", READMES)
def test_readme_names_files_that_exist(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    yamls = set(re.findall(r"[\w./-]+\.yaml", text)) - {"mine.yaml"}  # the reader's own
    known = {path.name for folder in ("models", "data") for path in (ROOT / folder).rglob("*.yaml")}
    known |= {path.name for path in ROOT.glob(".*.yaml")}
    missing = {name for name in yamls if Path(name).name not in known and not (ROOT / name).exists()}
    assert not missing
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links), links
    for target in re.findall(r"\bmake ([a-z]+)\b", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"no target {target}"


def test_readmes_tell_the_same_in_both_languages():
    """Commands, links and the rows of tables are alike; only the prose differs."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    commands = [re.findall(r"^(?:python|pip|make|git) .*", text, re.M) for text in (english, chinese)]
    assert commands[0] == commands[1] and len(commands[0]) >= 5
    figures = [re.findall(r"^\| [nsmlx] .*", text, re.M) for text in (english, chinese)]
    assert figures[0] == figures[1]


def test_model_table_of_the_readme_agrees_with_the_yaml_headers():
    """Every cell "millions / GFLOPs" is what opens the model's YAML."""
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    sizes = {cells[0]: cells[1:] for cells in lines if cells[0] in ("n", "s", "m", "l", "x")}
    assert len(sizes) == 5
    suffixes = ("", "-gsneck", "-slimneck", "-slimneck-c", "-slimneck-q", "-gsconv", "-af", "-slimneck-af")
    table = [
        (f"yolov5{size}{suffix}.yaml", cell)
        for size, cells in sizes.items()
        for suffix, cell in zip(suffixes, cells, strict=True)
    ]
    modules = [
        (f"{cells[0].strip('`')}.yaml", cells[1]) for cells in lines if "arxiv.org" in cells[-1] and len(cells) == 3
    ]
    assert len(modules) == 4
    for name, cell in table + modules:
        header = (ROOT / "models" / name).read_text(encoding="utf-8").split("\nnc:")[0].replace(",", "")
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", header)]
        millions, gflops = map(float, cell.split(" / "))
        assert any(abs(number / 1e6 - millions) <= 0.00501 for number in numbers), f"{name}: {millions} M"
        assert any(abs(number - gflops) <= 0.0501 for number in numbers), f"{name}: {gflops} GFLOPs"


def test_requirements_name_every_package_that_is_imported():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in REQUIREMENTS]
    named = set(re.findall(r"^([\w-]+)", "".join(texts), re.M))
    packages = {"cv2": "opencv-python", "yaml": "pyyaml", "PIL": "pillow", "prometheus_client": "prometheus-client"}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            for top in {name.split(".")[0] for name in names}:
                ours = (ROOT / top).exists() or (ROOT / f"{top}.py").exists()
                assert ours or top in sys.stdlib_module_names or packages.get(top, top) in named, (
                    f"{relative(path)}: {top}"
                )


def test_continuous_integration_calls_the_makefile():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR and "make test" in script.read_text()
    assert "entry: make check" in (ROOT / ".pre-commit-config.yaml").read_text()


def documented_commands():
    """The commands of the READMEs, of docs and of `make demo`: (script, arguments)."""
    demo = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pages = [*(ROOT / name for name in READMES), *(ROOT / "docs").glob("*.md")]
    texts = [demo, *(page.read_text(encoding="utf-8") for page in pages)]
    found = [match for text in texts for match in re.findall(COMMAND, text.replace("\\\n", " "))]
    return sorted({(script, arguments.strip()) for script, arguments in found if arguments.strip() != "--help"})


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_documented_commands_are_understood():
    commands = documented_commands()
    assert {script for script, _ in commands} == {"train", "val", "detect", "export", "serve"} and len(commands) >= 7
    for script, arguments in commands:
        importlib.import_module(script).build_parser().parse_args(shlex.split(arguments))  # exits when it is not
