"""The generated file: one module, few dependencies, only what the model uses, the same every time."""

import ast
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest

from moe_vision.modeling.flatten import (
    ALLOWED,
    FlattenError,
    Source,
    check_clashes,
    flatten,
    merged_imports,
    read,
)
from moe_vision.registry import EXPERTS
from tests.tiny import tiny_config

ALL = ("clip", "convnext", "pix2struct", "eva02", "sam")


def source(text: str, name: str = "moe_vision.a") -> Source:
    return read(name, f"{name}.py", textwrap.dedent(text))


def test_flatten_keeps_only_what_the_model_uses() -> None:
    text = flatten(tiny_config(("clip",)))
    assert "class ClipExpert" in text and "class ChannelConcat(" in text and "class MoeVisionProcessor" in text
    for absent in (
        "SamExpert",
        "Eva02Expert",
        "ConvNextModel",
        "Pix2Struct",
        "register_auto_classes",
        "import pydantic",
    ):
        assert absent not in text


def test_flatten_is_reproducible_and_follows_the_config() -> None:
    assert flatten(tiny_config(ALL)) == flatten(tiny_config(ALL))
    first, second = (flatten(tiny_config(experts)) for experts in (("clip",), ("sam",)))
    digests = [re.search(r"sources_sha256: ([0-9a-f]{64})", text)[1] for text in (first, second)]
    assert digests[0] != digests[1]
    assert "# moe_vision_format: 1\n" in first


def test_flatten_has_no_import_that_the_loader_would_refuse() -> None:
    text = flatten(tiny_config(ALL))
    assert not re.search(r"^\s*(from\s+\.|import\s+moe_vision|from\s+moe_vision)", text, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in ALLOWED
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in ALLOWED for alias in node.names)


def test_flatten_runs_with_a_registry_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flattened")
    monkeypatch.setitem(sys.modules, "flattened", module)  # dataclasses look their module up
    exec(compile(flatten(tiny_config(ALL)), "flattened.py", "exec"), module.__dict__)
    assert sorted(module.EXPERTS) == sorted(ALL)
    assert module.EXPERTS is not EXPERTS


@pytest.mark.parametrize("statement", ["import timm", "from einops import rearrange", "def f():\n    import timm"])
def test_foreign_import_is_refused(statement: str) -> None:
    with pytest.raises(FlattenError, match=r"moe_vision\.a\.py:\d+: `.*(timm|einops)"):
        source(statement)


def test_foreign_import_inside_try_is_kept() -> None:
    kept = source("try:\n    import timm\nexcept ImportError:\n    timm = None\n")
    assert "import timm" in kept.body and kept.defines == {"timm"}


@pytest.mark.parametrize(
    "statement",
    ["from . import x", "import moe_vision.types", "from moe_vision.types import *", "from torch import *",
     "from __future__ import annotations", "def f():\n    from moe_vision.types import MapShape",
     '"""Text.\n\nfrom .nothere import x\n"""', '"""Text.\n\nimport sam\n"""'],
)  # fmt: skip
def test_what_one_file_cannot_keep_is_refused(statement: str) -> None:
    with pytest.raises(FlattenError, match=r"moe_vision\.a\.py:\d+"):
        source(statement)


def test_aliases() -> None:
    parsed = source("import numpy as np\nfrom moe_vision.types import MapShape as Shape\nfrom torch import nn as n\n")
    assert "Shape = MapShape" in parsed.body and parsed.needs == ["moe_vision.types"]
    assert merged_imports([parsed]) == "import numpy as np\nfrom torch import nn as n"


def test_names_of_packages_resolve_to_their_modules() -> None:
    parsed = source("from moe_vision.experts import EXPERTS, Expert\nfrom moe_vision import MIXERS\n")
    assert parsed.needs == ["moe_vision.registry", "moe_vision.experts.base"]


@pytest.mark.parametrize(
    ("first", "second"),
    [("def helper(): ...", "helper = 1"), ("from torch import nn", "class nn: ..."),
     ("from transformers import CLIPVisionModel as M", "from transformers import SamVisionModel as M")],
)  # fmt: skip
def test_clash_names_both_modules(first: str, second: str) -> None:
    with pytest.raises(FlattenError, match=r"moe_vision\.a\.py.*moe_vision\.b\.py"):
        check_clashes([source(first), source(second, "moe_vision.b")])


def test_plugin_is_appended(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from moe_vision.experts import EXPERTS\n\n\ndef my_own_function() -> int:\n    return len(EXPERTS)\n"
    )
    text = flatten(tiny_config(("clip",)), [plugin])
    assert "# ---- plug-in mine.py" in text and "def my_own_function" in text
    assert "from moe_vision" not in text and str(tmp_path) not in text
