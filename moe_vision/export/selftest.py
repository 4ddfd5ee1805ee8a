"""Prove that an exported folder works in a process that cannot import moe_vision; prints one JSON line.

Run as a script: `python selftest.py FOLDER FIXTURE`. The fixture holds image.png, expected.safetensors and
fixture.json {text, atol}.
"""

import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class Barrier(MetaPathFinder):
    """Refuses moe_vision, installed or not."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname.split(".")[0] == "moe_vision":
            raise ImportError(f"the self-test must do without moe_vision, and something imports '{fullname}'")


def check(folder: Path, fixture: Path) -> dict[str, Any]:
    """Load, compare with the source model's logits, generate. Raises where something is not as promised."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    settings = json.loads((fixture / "fixture.json").read_text(encoding="utf-8"))
    expected = load_file(fixture / "expected.safetensors")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    model, info = loaded
    wrong = {kind: [str(key) for key in keys][:8] for kind, keys in info.items() if keys}
    if wrong:
        raise RuntimeError(f"weights and code do not belong together: {wrong}")
    if type(config) is not model.config_class or type(processor).__module__ != type(model).__module__:
        raise RuntimeError("config, processor and model come from different copies of the exported file")
    inputs = processor(images=Image.open(fixture / "image.png"), text=settings["text"], return_tensors="pt")
    for name in ("input_ids", "pixel_values"):
        if not torch.equal(inputs[name], expected[name]):
            raise RuntimeError(f"the exported processor gives other {name} than the source's")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    model.eval()
    with torch.inference_mode():
        logits = model(**inputs).logits.float()
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    difference = (logits - expected["logits"]).abs().max().item()
    if not difference <= settings["atol"]:  # written so that NaN fails
        raise RuntimeError(f"logits differ by up to {difference} from the source model's; at most {settings['atol']}")
    return {
        "max_difference": difference,
        "new_tokens": generated.shape[1] - inputs["input_ids"].shape[1],
        "model_class": f"{type(model).__module__}.{type(model).__name__}",
    }


if __name__ == "__main__":
    # A script's own folder is first on the path, and `flatten` and `hf` would be importable from there.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    sys.meta_path.insert(0, Barrier())
    print(json.dumps(check(Path(sys.argv[1]), Path(sys.argv[2]))))
