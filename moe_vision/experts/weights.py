"""Weights of an expert from a file, a folder, the Hub or this package, checked key by key before they are used."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from moe_vision.experts.base import Expert, ExpertConfig, ExpertSpec
from moe_vision.experts.key_layouts import LAYOUTS, KeyLayout
from moe_vision.experts.shards import WeightFiles, listed, read_files, weight_files
from moe_vision.experts.weight_values import WeightsError, check_values, may_be_zero, origin
from moe_vision.registry import suggest

PACKAGE_SCHEME = "moe_vision:"
LIBRARIES = ("timm", "open_clip", "segment_anything")
SEGMENT_ANYTHING_URLS = {
    "vit_b": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
    "vit_l": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
    "vit_h": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
}
"""The published files, from segment_anything's README; the library itself downloads nothing."""


def packaged(name: str) -> Path:
    """Path of a file or folder that ships with this package, `moe_vision:micro/…` in configs."""
    return Path(str(resources.files("moe_vision"))) / "weights" / name.removeprefix(PACKAGE_SCHEME)


def located(source: str) -> str:
    """A packaged source as a path; anything else as it is."""
    return str(packaged(source)) if source.startswith(PACKAGE_SCHEME) else source


def load_expert_weights(expert: Expert, pretrained: str) -> None:
    """Load `pretrained` into `expert`, whole or not at all, whichever library's names its keys have.

    Raises WeightsError naming what differs.
    """
    spec = expert.config.spec
    source = spec_source(spec) if pretrained == "default" else pretrained
    library = source.partition(":")[0] in LIBRARIES
    load_state(expert, read_library(source) if library else read_files(resolve(source, spec)), source)


def load_state(expert: Expert, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict with any library's names. Raises WeightsError, which calls it `source`, if it does not fit."""
    expert.model.load_state_dict(fitted(expert, state, source), strict=not expert.config.spec.may_miss)


def fitted(expert: Expert, state: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The tensors of `state`, named by any library, by the names of `expert.model`. Raises WeightsError."""
    config = expert.config
    wanted = expert.model.state_dict()
    own = KeyLayout("the checkpoint itself", config.spec.key_prefix, optional=config.spec.optional_keys)
    fits = [Fit.of(layout, state, wanted, config) for layout in (own, *LAYOUTS.get(config.type_name, ()))]
    best = min(fits, key=lambda fit: fit.faults)
    if best.faults:
        raise WeightsError(
            f"weights '{source}' do not fit expert {config.type_name} '{config.variant}' (names of "
            f"{best.layout.source}): missing {listed(best.missing)}; unexpected {listed(best.unexpected)}; "
            f"shapes {listed(best.misshapen)}. "
            "Choose the variant that these weights belong to, or pretrained: null for random weights"
        )
    floating = {key: value for key, value in best.found.items() if wanted[key].is_floating_point()}
    check_values(
        floating, lambda key: may_be_zero(key, wanted[key]), lambda key: origin(best.found[key], key, source, state)
    )
    return best.found


@dataclass(frozen=True)
class Fit:
    """How well a state dict, read by one layout, fits a module."""

    layout: KeyLayout
    found: dict[str, torch.Tensor]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    @classmethod
    def of(
        cls, layout: KeyLayout, state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor],
        config: ExpertConfig,
    ) -> "Fit":  # fmt: skip
        """Read `state` by `layout` and compare it with the state dict that is wanted."""
        found = layout.read(state)
        missing = [key for key in wanted if key not in found and not key.startswith(config.spec.may_miss)]
        unexpected = [key for key in found if key not in wanted and not key.startswith(config.left_out())]
        misshapen = [
            f"{key} {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in wanted
            if key in found and found[key].shape != wanted[key].shape
        ]
        return cls(layout, {key: found[key] for key in wanted if key in found}, missing, unexpected, misshapen)


def spec_source(spec: ExpertSpec) -> str:
    """Where a checkpoint's own weights are: the Hub, or this package."""
    return spec.hub_id if spec.hub_id is not None else f"{PACKAGE_SCHEME}{spec.filename}"


def resolve(source: str, spec: ExpertSpec) -> WeightFiles:
    """Files of a source: a local file, a local folder, a packaged file, or a Hub repository at the spec's revision.

    Of a folder, those that `weight_files` finds. Raises WeightsError where there are none.
    """
    path = Path(located(source)).expanduser()
    if path.is_file():
        return {path: None}
    if not path.exists():
        if source.startswith((PACKAGE_SCHEME, "/", ".", "~")) or source.count("/") != 1:
            raise WeightsError(f"pretrained '{source}': no such file or folder; give a path that exists, or a Hub id")
        patterns = [spec.filename] if spec.filename else ["*.safetensors", "*.bin", "*.pth", "*.index.json"]
        path = Path(snapshot_download(source, revision=spec.revision, allow_patterns=patterns))
    if spec.filename and (path / spec.filename).is_file():
        return {path / spec.filename: None}
    if files := weight_files(path, (".safetensors", ".bin", ".pth")):
        return files
    raise WeightsError(
        f"folder '{path}' holds no .safetensors, .bin or .pth file: give the folder that holds the weights"
    )


def read_library(source: str) -> dict[str, torch.Tensor]:
    """Weights by a library's own name for them: `timm:MODEL`, `open_clip:ARCHITECTURE/TAG`, `segment_anything:vit_l`.

    timm and open_clip download, cache and convert as they do for their own users; both take `local-dir:FOLDER` too.
    Raises WeightsError where the library does not know the name or cannot get the weights.
    """
    library, _, name = source.partition(":")
    try:
        if library == "segment_anything":
            if name not in SEGMENT_ANYTHING_URLS:
                raise WeightsError(f"pretrained '{source}': {suggest(name, list(SEGMENT_ANYTHING_URLS))}")
            loaded = torch.hub.load_state_dict_from_url(
                SEGMENT_ANYTHING_URLS[name], map_location="cpu", weights_only=True, check_hash=True
            )
            return dict(loaded)
        if library == "timm":
            import timm

            return dict(timm.create_model(name, pretrained=True).state_dict())
        import open_clip

        architecture, _, tag = name.partition("/")
        if name.startswith(("local-dir:", "hf-hub:")):
            architecture, tag = name, ""
        elif not tag:
            raise WeightsError(f"pretrained '{source}' has no tag: write open_clip:ARCHITECTURE/TAG")
        model = open_clip.create_model(architecture, pretrained=tag or None, require_pretrained=True)
        return dict(model.state_dict())
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"pretrained '{source}': {library} cannot give these weights ({error})") from error
