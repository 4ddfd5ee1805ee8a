"""The barrier of the other tests here is no decoration."""

from pathlib import Path

import pytest

from tests.export.isolated import isolated


def test_the_barrier_refuses_moe_vision(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="must do without moe_vision"):
        isolated("imports_moe_vision", home=tmp_path)
