"""Imports point down only, deferred ones included, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import moe_vision

ROOT = Path(moe_vision.__file__).parent
LAYERS = {
    "registry": 0, "types": 0, "errors": 0, "files": 0, "yaml_reader": 0, "plugins": 0, "config_paths": 0, "config": 0,
    "terminal": 0,
    "slicing": 1, "experts": 1, "fusion": 1,
    "modeling": 2,
    "data": 3, "interop": 3, "evaluation": 4,
    "training": 4, "recipes": 4, "export": 4, "viz": 5,
    "quickstart": 6, "comparison": 6, "search": 6, "cli": 7, "__main__": 8,
}  # fmt: skip
SIBLINGS_MAY = {
    "config": {"registry", "errors", "files", "yaml_reader", "plugins", "config_paths"},
    "config_paths": {"registry", "files"}, "plugins": {"errors", "files"}, "yaml_reader": {"errors"},
    "recipes": set(), "export": set(),
}  # fmt: skip


def imports() -> list[tuple[str, str, Path]]:
    found = []
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        if relative == Path("__init__.py"):
            continue
        own = relative.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            found += [(own, m.split(".")[1], path) for m in modules if m.startswith("moe_vision.")]
    return found


def test_imports_point_down() -> None:
    found = imports()
    assert len(found) > 50
    for own, other, path in found:
        if own == other:
            continue
        below = LAYERS[other] < LAYERS[own] or other in SIBLINGS_MAY.get(own, set())
        assert below, f"{path} ({own}) imports {other}, which is not below it"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import moe_vision, sys; assert 'torch' not in sys.modules; print(moe_vision.__version__)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
