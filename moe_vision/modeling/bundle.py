"""The generated file beside what `save_pretrained` of the installed classes writes."""

import functools
import logging
from pathlib import Path
from typing import Any

from moe_vision.modeling.configuration_moe_vision import MoeVisionConfig
from moe_vision.modeling.flatten import MODULE_NAME, FlattenError, flatten, used_modules
from moe_vision.modeling.image_processing_moe_vision import MoeVisionImageProcessor
from moe_vision.modeling.processing_moe_vision import MoeVisionProcessor
from moe_vision.registry import SLICING

logger = logging.getLogger(__name__)

AUTO_MAP = {
    "AutoConfig": f"{MODULE_NAME}.MoeVisionConfig",
    "AutoModel": f"{MODULE_NAME}.MoeVisionModel",
    "AutoModelForImageTextToText": f"{MODULE_NAME}.MoeVisionForConditionalGeneration",
    "AutoModelForMultimodalLM": f"{MODULE_NAME}.MoeVisionForConditionalGeneration",
    "AutoProcessor": f"{MODULE_NAME}.MoeVisionProcessor",
    "AutoImageProcessor": f"{MODULE_NAME}.MoeVisionImageProcessor",
}
PROCESSORS = {name: AUTO_MAP[name] for name in ("AutoProcessor", "AutoImageProcessor")}


@functools.cache
def flattened(modules: tuple[str, ...]) -> str:
    """The file of some modules. Kept: training saves often, and a later text might not be of the code that runs."""
    return flatten(modules)


def write_bundle(saved: MoeVisionConfig | MoeVisionImageProcessor | MoeVisionProcessor, folder: Path) -> None:
    """Write the file that a config, an image processor or a processor needs, and name its classes in their `auto_map`.

    A model's file holds all that its processor needs, so that one that is there is kept. Sources that cannot become
    one file, as a plug-in's with dependencies of its own, get a warning: the folder needs this package then, and
    `export` refuses it.
    """
    file = folder / f"{MODULE_NAME}.py"
    parts: list[Any] = [saved]
    if isinstance(saved, MoeVisionConfig):
        modules, auto_map = used_modules(saved), AUTO_MAP
    else:
        images: Any = saved.image_processor if isinstance(saved, MoeVisionProcessor) else saved
        parts.append(images)
        modules, auto_map = [SLICING[images.slicing["type"]].__module__], PROCESSORS
    if isinstance(saved, MoeVisionConfig) or not file.is_file():
        try:
            text = flattened(tuple(modules))
        except FlattenError as error:
            logger.warning("'%s' is not written, its folder needs moe_vision to be loaded: %s", file, error)
            return
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for part in parts:
        part.auto_map = dict(auto_map)
