"""Strings of others in the model card and in generated code: shown as text, never run, never markup."""

import ast
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from moe_vision.export.card import model_card, results_table, training_of
from moe_vision.export.markdown import code, plain
from moe_vision.modeling.flatten import FlattenError, flatten
from tests.tiny import tiny_config, tiny_model

EVIL = [
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://evil/x.png)", "a | b | c", "x\n\n# Heading",
    "x\n---\nlicense: mit", "`code` ``more``", "*bold* _it_ __b__", "<img src=x onerror=y>", "&lt;b&gt;", "a\\|b", "\\",
    "\\`", "http://evil.example/x", "x\u2028y\u202ez", "| --- |", "```\nblock", "~~x~~", "\ud800", "`", "``", "",
]  # fmt: skip


class Tags(HTMLParser):
    """Tags and text of HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(text: str) -> Tags:
    """By an independent implementation of CommonMark with GitHub's tables."""
    tags = Tags()
    tags.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))
    return tags


def shown(text: str) -> str:
    """What a reader should see of a text."""
    return " ".join(re.sub("[\x00-\x1f\u2028\u202e\ud800]", " ", text).split())


@pytest.mark.parametrize("text", EVIL)
def test_a_cell_shows_its_text_and_nothing_else(text: str) -> None:
    page = rendered(f"| a | b |\n|---|---|\n| {plain(text)} | end |")
    assert page.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert " ".join(page.text.split()) == f"a b {shown(text)} end".replace("  ", " ")


@pytest.mark.parametrize("text", [text for text in EVIL if text])
def test_inline_code_shows_its_text_and_nothing_else(text: str) -> None:
    page = rendered(f"| a | b |\n|---|---|\n| {code(text)} | end |")
    assert page.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "code", "td"]
    assert "".join(page.text.split()) == "".join(f"a b {shown(text)} end".split())


def test_a_card_of_evil_metrics_and_configs_has_no_markup_of_theirs(tmp_path: Path) -> None:
    model, processor = tiny_model(("clip",))
    processor.image_token = '"); import os; ("\n```\n<script>'
    processor.chat_template = None
    model.config.text_config.model_type = "`</code><script>"
    stage = {
        "name": EVIL[0], "train": {EVIL[4]: 0.1}, "prealign": None, "lora": None,
        "data": {"path": "/home/me/" + EVIL[6]}, "max_steps": 3, "epochs": None, "batch_size": 2,
    }  # fmt: skip
    schedule = {"seed": "3\n# x", "stages": [stage], "model": {"language_model": {"pretrained": EVIL[2]}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(schedule))
    card = model_card(model, processor, {text: text for text in EVIL}, training_of(tmp_path))
    header, body = card.split("---\n", 2)[1:]
    assert set(yaml.safe_load(header)) == {"library_name", "pipeline_tag", "license", "tags"}
    page = rendered(body)
    assert not {"script", "img", "a"} & set(page.tags)
    assert page.tags.count("h1") == 1 and len(re.findall("^## ", body, re.MULTILINE)) == page.tags.count("h2")
    (python,) = re.findall("^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
    texts = [
        node.value.value
        for node in ast.parse(python).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "text"
    ]
    assert texts == [processor.image_token + " What is in the picture?"]
    assert "/home/me" not in card


def test_results_have_one_row_each() -> None:
    table = results_table({text: 0.5 for text in EVIL})
    assert len(table.strip().splitlines()) == 4 + len(EVIL)


@pytest.mark.parametrize("name", ["x\nimport os\n.py", "x\rimport os.py", "x\u2028y.py", "a'b.py", "a#b\x0c.py"])
def test_the_name_of_a_plugin_does_not_become_code(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x = 1\n")
    with pytest.raises(FlattenError, match="rename it"):
        flatten(tiny_config(("clip",)), [tmp_path / name])


def test_lines_are_counted_as_python_counts_them(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(
        "VALUE = 1  # \x0c\x1c\u2028 \n\x0cimport math\n\nROOT = math.sqrt(4)\n", encoding="utf-8"
    )
    text = flatten(tiny_config(("clip",)), [tmp_path / "page.py"])
    bodies = [ast.unparse(node) for node in ast.parse(text).body]
    assert "ROOT = math.sqrt(4)" in bodies and bodies.count("import math") == 1


@pytest.mark.parametrize(
    "text", ["{", "stages: 3", "stages: [3]", "seed: 3", "stages: [{name: a}]", "[1]", "a: 1\na: 2"]
)
def test_a_config_that_training_did_not_write_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        training_of(tmp_path)


@pytest.mark.parametrize(
    "text", ["[1]", "{", "null", '{"01-a": 3}', '{"a": [{"used": 3}]}', '{"01-a": [{"used": "x"}]}']
)
def test_a_data_report_of_a_wrong_kind_is_named(tmp_path: Path, text: str) -> None:
    stage = {"name": "a", "train": {"a": 0.1}, "prealign": None, "lora": None, "data": None, "max_steps": 3,
             "epochs": None, "batch_size": 2}  # fmt: skip
    schedule = {"seed": 3, "stages": [stage], "model": {"language_model": {"pretrained": None}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(schedule))
    assert "| a |" in str(training_of(tmp_path))
    (tmp_path / "data_report.json").write_text(text)
    with pytest.raises(ValueError, match=r"data_report\.json"):
        training_of(tmp_path)
