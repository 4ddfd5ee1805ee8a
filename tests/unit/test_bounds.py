"""Numbers that would never end are refused, and a command's output never replaces its input."""

from pathlib import Path

import pytest
from jinja2 import TemplateError
from PIL import Image
from typer.testing import CliRunner

from moe_vision.cli import app
from moe_vision.fusion import ADAPTERS
from moe_vision.modeling.chat_rendering import render_chat
from moe_vision.registry import SLICING
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(("policy", "name"), [("uhd", "max_slices"), ("slime", "max_tiles"), ("tiles", "max_tiles")])
def test_more_views_than_can_be_planned_are_refused(policy: str, name: str) -> None:
    assert SLICING[policy](**{name: 10_000}).plan((99_999, 99_999)).views
    for value in (10_001, 10**8):
        with pytest.raises(ValueError, match=f"{name} {value} of slicing '{policy}': must be at most 10000"):
            SLICING[policy](**{name: value})


def test_a_projector_of_a_million_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="depth 1000000 of mlp: must be at most 100"):
        ADAPTERS["mlp"](depth=1_000_000)


def test_a_chat_template_that_loops_without_end_is_a_fault_of_the_template() -> None:
    with pytest.raises(TemplateError, match="Range too big"):
        render_chat(tiny_tokenizer(), "{% for i in range(999999) %}x{% endfor %}", [{"role": "user", "content": "a"}])


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    photo, data = tmp_path / "photo.png", tmp_path / "data.json"
    Image.new("RGB", (64, 48)).save(photo)
    data.write_text("[]")
    (tmp_path / "link.png").symlink_to(photo)
    before = photo.read_bytes()
    plan = ["plan", str(photo), "--policy", "uhd", "--image"]
    commands = [[*plan, str(photo)], [*plan, str(tmp_path / "link.png")],
                ["eval", str(tmp_path), str(data), "--predictions", str(data)]]  # fmt: skip
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert "would be overwritten" in str(result.exception)
    assert photo.read_bytes() == before and data.read_text() == "[]"
