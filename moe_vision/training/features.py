"""What frozen parts made of pictures, kept: each picture goes through them once, not once an epoch.

Where neither experts nor mixers train, mixed tokens [N, C] stand for a picture; where mixers train, the maps [C, h, w]
of the frozen experts do. An expert that trains, or between whose blocks a mixer speaks, runs in every step, on pixels.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_vision.data.collate import views_of
from moe_vision.data.records import Record
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.training.groups import touches
from moe_vision.training.schedule import StageConfig

PIXELS = "pixel_values"


class Maps:
    """Maps [C, h, w], or pixels [3, H, W], of pictures by path, all made by the same."""

    def __init__(self) -> None:
        self.kept: dict[Path, torch.Tensor] = {}

    def __getitem__(self, path: Path) -> torch.Tensor:
        return self.kept[path]

    def __contains__(self, path: Path) -> bool:
        return path in self.kept

    def missing(self, paths: Sequence[Path]) -> list[Path]:
        """Those of the pictures that are not here."""
        return [path for path in paths if path not in self]

    def add(self, paths: Sequence[Path], maps: torch.Tensor) -> None:
        """maps [n, …] of n pictures."""
        self.kept |= zip(paths, maps, strict=True)

    def flush(self) -> None:
        """All of a batch of pictures was added."""


class FeatureCache:
    """Maps of pictures by a digest of what makes them, in memory.

    Runs over the same pictures may share one: the digest holds the expert's weights, so a map never stands for what
    another expert would have made.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Maps] = {}

    def of(self, digest: str, made_by: str) -> Maps:
        """The maps of a digest. made_by: tells people what it is."""
        return self.kept.setdefault(digest, Maps())

    def size(self) -> int:
        """Bytes."""
        return sum(value.nbytes for maps in self.kept.values() for value in maps.kept.values())

    def has_room(self, new: int, beside: int, cache_bytes: float) -> bool:
        """Whether so many bytes more fit into a stage's `cache_gb`, with others beside them."""
        return self.size() + new + beside <= cache_bytes

    def filling(self, stores: Sequence[Maps]) -> AbstractContextManager[None]:
        """Held while maps are added."""
        return nullcontext()


@dataclass(frozen=True)
class KnownPictures:
    """What stands for pictures.

    mixed_tokens: [N, C] by path, or maps: [C, h, w] by expert and path, with pixels where an expert has to run:
    [3, H, W] by path, as bytes that `rescale_factor` brings to [0, 1] where no bit is lost by that.
    """

    mixed_tokens: Mapping[Path, torch.Tensor] | None = None
    maps: Mapping[str, Maps] | None = None
    pixels: Maps | None = None
    rescale_factor: float = 1 / 255

    def __call__(self, images: Sequence[Path]) -> dict[str, Any]:
        """The model's inputs: mixed_tokens [images, N, C], or feature_maps [images, C, h, w] by expert and pixel_values
        [images, 3, H, W]."""
        made = self.item(images)
        if "mixed_tokens" in made:
            made["mixed_tokens"] = torch.stack(made["mixed_tokens"])
        if "feature_maps" in made:
            made["feature_maps"] = {name: torch.stack(maps) for name, maps in made["feature_maps"].items()}
        return made

    def item(self, images: Sequence[Path]) -> dict[str, Any]:
        """As the model's inputs, but a list for what is joined only in a batch: no map is copied here."""
        made: dict[str, Any] = {}
        if self.mixed_tokens is not None:
            made["mixed_tokens"] = [self.mixed_tokens[path] for path in images]
        if self.maps is not None:
            made["feature_maps"] = {name: [known[path] for path in images] for name, known in self.maps.items()}
        if self.pixels is not None:
            made[PIXELS] = rescaled(torch.stack([self.pixels[path] for path in images]), self.rescale_factor)
        return made


def stage_inputs(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, records: Sequence[Record],
    stage: StageConfig, rates: Mapping[str, float], cache: FeatureCache | None = None,
) -> KnownPictures | None:  # fmt: skip
    """What stands for the pictures of a stage's records; None where they have to be seen anew in each step: because the
    stage says so, because they are sliced, into views of many sizes, or because it would not fit into `cache_gb`.

    cache: keeps the maps for further stages and runs, where they fit.
    """
    if not stage.cache_features or not model.model.policy.one_view:
        return None
    paths = pictures_of(records)
    shape = model.config.vision_config.mixed_shape("overview")
    mixed_bytes = len(paths) * shape.num_tokens * shape.channels * 4
    if touches("mixers", rates) or touches("experts", rates) or mixed_bytes > stage.cache_gb * 1e9:
        return known_maps(model, processor, paths, stage, rates, FeatureCache() if cache is None else cache)
    known = None
    if cache is not None:
        known = known_maps(model, processor, paths, stage, rates, cache, beside=mixed_bytes)
    return KnownPictures(mixed_tokens=mixed_once(model, processor, paths, stage, known))


def known_maps(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, paths: Sequence[Path], stage: StageConfig,
    rates: Mapping[str, float], cache: FeatureCache, beside: int = 0,
) -> KnownPictures | None:  # fmt: skip
    """Maps of every expert that may run beforehand, and pixels for the others; None if none may, or if they do not fit
    into the cache, with so many bytes beside them."""
    vision, tower = model.config.vision_config, model.model.vision_tower
    injected: Any = tower.mixers["overview"].injected
    names = vision.branch_experts("overview")
    frozen = [name for name in names if not touches(f"experts.{name}", rates) and name != injected]
    if not frozen:
        return None
    stores = maps_of(model, processor, paths, frozen, stage, cache, beside, pixels=len(frozen) < len(names))
    if stores is None:
        return None
    factor = processor.image_processor.rescale_factor
    return KnownPictures(None, {name: stores[name] for name in frozen}, stores.get(PIXELS), factor)


def expert_maps(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, paths: Sequence[Path],
    names: Sequence[str], stage: StageConfig, cache: FeatureCache,
) -> dict[str, Maps]:  # fmt: skip
    """Maps of these experts, whatever trains. Raises ValueError if they do not fit into the cache."""
    stores = maps_of(model, processor, paths, names, stage, cache)
    if stores is None:
        raise ValueError(f"maps of {', '.join(names)} of {len(paths)} pictures do not fit into the feature cache: give "
                         "it more gigabytes")  # fmt: skip
    return stores


def maps_of(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, paths: Sequence[Path],
    names: Sequence[str], stage: StageConfig, cache: FeatureCache, beside: int = 0, *, pixels: bool = False,
) -> dict[str, Maps] | None:  # fmt: skip
    """Maps of these experts, and pixels if wanted, by name; None where they do not fit."""
    vision, tower = model.config.vision_config, model.model.vision_tower
    canvas = {key: value for key, value in vision.slicing.items() if not key.startswith("tokens_per")}
    configs, shapes = vision.expert_configs(), vision.map_shapes("overview")
    stores = {
        name: cache.of(
            digest_of(tower.experts[name], (configs[name].to_dict(), canvas, stage.precision)), f"expert '{name}'"
        )
        for name in names
    }
    sizes = {name: 4 * shapes[name].channels * shapes[name].grid[0] * shapes[name].grid[1] for name in names}
    if pixels:
        height, width = vision.canvas_size()
        stores[PIXELS], sizes[PIXELS] = cache.of(digest_of(None, canvas), "pixels"), 3 * height * width
    missing = {name: store.missing(paths) for name, store in stores.items()}
    new = sum(sizes[name] * len(missing[name]) for name in stores)
    if not cache.has_room(new, beside, stage.cache_gb * 1e9):
        return None
    if new:
        with cache.filling(list(stores.values())):
            missing = {name: store.missing(paths) for name, store in stores.items()}  # others may have been here
            fill(model, processor, stores, missing, stage)
    return stores


@torch.no_grad()
def fill(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor,
    stores: Mapping[str, Maps], missing: Mapping[str, Sequence[Path]], stage: StageConfig,
) -> None:  # fmt: skip
    """Put what is missing into the stores of maps, by expert, and of pixels."""
    tower = model.model.vision_tower.eval()
    factor = processor.image_processor.rescale_factor
    for chunk in chunks(sorted({path for paths in missing.values() for path in paths}), stage.batch_size):
        views = pixels_of(chunk, processor)
        # Kernels round differently for batches of other sizes: a map must not depend on what else was missing.
        full = torch.cat([views, views[-1:].expand(stage.batch_size - len(views), -1, -1, -1)])
        on_device = full.to(next(tower.parameters()).device, tower.dtype)
        for name, store in stores.items():
            if all(path in store for path in chunk):
                continue
            if name == PIXELS:
                made = as_bytes(views, factor)
            else:
                with autocast(stage, on_device.device):
                    made = tower.experts[name](on_device).data[: len(chunk)].cpu()
            store.add(chunk, made)
    for store in stores.values():
        store.flush()


@torch.no_grad()
def mixed_once(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, paths: Sequence[Path], stage: StageConfig,
    known: KnownPictures | None,
) -> dict[Path, torch.Tensor]:  # fmt: skip
    """Mixed tokens [N, C] of every picture, from known maps where there are any."""
    tower = model.model.vision_tower.eval()
    device = next(tower.parameters()).device
    mixed: dict[Path, torch.Tensor] = {}
    for chunk in chunks(paths, stage.batch_size):
        made: dict[str, Any] = {PIXELS: pixels_of(chunk, processor)} if known is None else known(chunk)
        views = made[PIXELS].to(device) if PIXELS in made else None
        maps = {name: value.to(device) for name, value in made.get("feature_maps", {}).items()}
        with autocast(stage, device):
            mixed |= zip(chunk, tower(views, feature_maps=maps).data.cpu(), strict=True)
    return mixed


def autocast(stage: StageConfig, device: torch.device) -> torch.autocast:
    """As Trainer runs the stage."""
    return torch.autocast(device.type, torch.bfloat16, enabled=stage.precision == "bf16")


def pictures_of(records: Sequence[Record]) -> list[Path]:
    """Every picture of records once."""
    return sorted({path for record in records for path in record.images})


def chunks(paths: Sequence[Path], size: int) -> list[Sequence[Path]]:
    return [paths[start : start + size] for start in range(0, len(paths), size)]


def pixels_of(paths: Sequence[Path], processor: MoeVisionProcessor) -> torch.Tensor:
    """Views [V, 3, H, W] of pictures that are one view each."""
    return torch.cat([views_of((path,), processor)[PIXELS] for path in paths])


def digest_of(module: torch.nn.Module | None, settings: Any) -> str:
    """Names what makes features: settings and every weight."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in module.state_dict().items() if module is not None else ():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def as_bytes(views: torch.Tensor, factor: float) -> torch.Tensor:
    """Views [V, 3, H, W] as bytes where `rescaled` gives exactly them back, else as they are."""
    stored = (views / factor).round().to(torch.uint8)
    return stored if torch.equal(rescaled(stored, factor), views) else views


def rescaled(stored: torch.Tensor, factor: float) -> torch.Tensor:
    return stored * factor if stored.dtype == torch.uint8 else stored
