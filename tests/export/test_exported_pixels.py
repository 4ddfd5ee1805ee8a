"""Without moe_vision, an image has the pixels that training saw, by whichever way it comes in."""

import hashlib
import shutil
from pathlib import Path

from moe_vision.data.collate import views_of
from moe_vision.modeling.compose import save
from tests.export.isolated import isolated
from tests.image_kinds import image_kinds
from tests.tiny import tiny_model

PHONE = Path(__file__).parents[1] / "cases" / "exif_6.jpg"


def test_every_way_into_an_exported_processor_gives_the_pixels_of_training(tmp_path: Path) -> None:
    model, processor = tiny_model(("clip",))
    save(model, processor, tmp_path / "model")  # with the exported code
    (tmp_path / "images").mkdir()
    paths = [path for path, _ in image_kinds(tmp_path / "images")]
    shutil.copy(PHONE, tmp_path / "images")
    expected = {
        path.name: hashlib.sha256(views_of([path], processor)["pixel_values"].numpy().tobytes()).hexdigest()
        for path in [*paths, tmp_path / "images" / PHONE.name]
    }
    report = isolated("image_pixels", tmp_path / "model", tmp_path / "images", home=tmp_path / "home")
    assert set(report["digests"]) == set(expected) and len(expected) > 40
    for name, ways in report["digests"].items():
        assert set(ways.values()) == {expected[name]}, (name, ways)
    assert len(report["digests"][PHONE.name]) == 9
    assert "photo.jpg': cannot be read as an image of a known format" in report["refusal"]
