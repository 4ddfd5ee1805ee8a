"""Weights of an expert from a file, a folder, the Hub or this package, checked key by key before they are used."""

from collections.abc import Mapping
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from moe_vision.experts.base import Expert, ExpertSpec

PACKAGE_SCHEME = "moe_vision:"


class WeightsError(ValueError):
    """Weights that are missing, broken, or belong to something else."""


def packaged(name: str) -> Path:
    """Path of a file or folder that ships with this package, `moe_vision:micro/…` in configs."""
    return Path(str(resources.files("moe_vision"))) / "weights" / name.removeprefix(PACKAGE_SCHEME)


def located(source: str) -> str:
    """A packaged source as a path; anything else as it is."""
    return str(packaged(source)) if source.startswith(PACKAGE_SCHEME) else source


def load_expert_weights(expert: Expert, pretrained: str) -> None:
    """Load `pretrained` into `expert`, whole or not at all. Raises WeightsError naming what differs."""
    spec = expert.config.spec
    source = spec_source(spec) if pretrained == "default" else pretrained
    found = strip_prefix(read_state_dict(resolve(source, spec)), spec.key_prefix)
    wanted = expert.model.state_dict()
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted and not optional(key, spec)]
    misshapen = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    if missing or unexpected or misshapen:
        raise WeightsError(
            f"weights '{source}' do not fit expert {expert.config.type_name} '{expert.config.variant}': "
            f"missing {listed(missing)}; unexpected {listed(unexpected)}; shapes {listed(misshapen)}. "
            "Choose the variant that these weights belong to, or pretrained: null for random weights"
        )
    expert.model.load_state_dict({key: found[key] for key in wanted})


def spec_source(spec: ExpertSpec) -> str:
    """Where a checkpoint's own weights are: the Hub, or this package."""
    return spec.hub_id if spec.hub_id is not None else f"{PACKAGE_SCHEME}{spec.filename}"


def resolve(source: str, spec: ExpertSpec) -> list[Path]:
    """Files of a source: a local file, a local folder, a packaged file, or a Hub repository at the spec's revision."""
    path = Path(located(source)).expanduser()
    if path.is_file():
        return [path]
    if not path.exists():
        if source.startswith((PACKAGE_SCHEME, "/", ".", "~")) or source.count("/") != 1:
            raise WeightsError(f"pretrained '{source}': no such file or folder; give a path that exists, or a Hub id")
        patterns = [spec.filename] if spec.filename else ["*.safetensors", "*.bin", "*.pth"]
        path = Path(snapshot_download(source, revision=spec.revision, allow_patterns=patterns))
    if spec.filename and (path / spec.filename).is_file():
        return [path / spec.filename]
    for pattern in ("*.safetensors", "*.bin", "*.pth"):
        if files := sorted(path.glob(pattern)):
            return files
    raise WeightsError(
        f"folder '{path}' holds no .safetensors, .bin or .pth file: give the folder that holds the weights"
    )


def read_state_dict(files: list[Path]) -> dict[str, torch.Tensor]:
    """Read and join files; pickles with `weights_only=True`. Raises WeightsError naming the file that is broken."""
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
                state |= loaded.get("model", loaded.get("state_dict", loaded))
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise WeightsError(f"'{file}' cannot be read ({error}): it may be truncated, fetch it again") from error
    return state


def strip_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Take `prefix` off the keys that have it; the others keep their names."""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def optional(key: str, spec: ExpertSpec) -> bool:
    return any(key.startswith(name) or fnmatch(key, f"{name}*") for name in spec.optional_keys)


def listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) + more) if names else "none"
