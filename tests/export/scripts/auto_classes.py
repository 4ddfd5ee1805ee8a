"""FOLDER OTHER EXPECTED WORK: every Auto class, logits, saving, and another export beside it.

EXPECTED: a safetensors file with a prompt's inputs and logits, made by the installed package. Prints JSON.
"""

import filecmp
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from folder import loaded
from safetensors.torch import load_file

AUTO = ("AutoConfig", "AutoImageProcessor", "AutoProcessor", "AutoTokenizer", "AutoModel",
        "AutoModelForImageTextToText", "AutoModelForMultimodalLM")  # fmt: skip


def refusals(folder: str) -> dict[str, str]:
    """What each Auto class says without leave to run the folder's code."""
    said = {}
    for name in AUTO:
        try:
            made = getattr(transformers, name).from_pretrained(folder)
        except ValueError as error:
            said[name] = f"ValueError: {'trust_remote_code' in str(error)}"
        else:
            said[name] = type(made).__name__
    return said


def logits_of(model: Any, expected: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes")}
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs).logits
    return logits


def saved(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def main(folder: str, other: str, expected_file: str, work: str) -> None:
    said = refusals(folder)
    ran_code = any("transformers_modules" in module and "moe_vision" in module for module in sys.modules)
    expected = load_file(expected_file)
    made = {name: getattr(transformers, name).from_pretrained(folder, trust_remote_code=True) for name in AUTO}
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    model.eval()
    processor = made["AutoProcessor"]
    first = saved(model, processor, Path(work) / "first")
    again, again_processor = loaded(str(first))
    second = saved(again, again_processor, Path(work) / "second")
    beside, _ = loaded(other)
    back, _ = loaded(folder)
    dtypes = {}
    for name in ("float32", "bfloat16", "float16"):
        cast, _ = loaded(folder, dtype=getattr(torch, name))
        found = {str(value.dtype).removeprefix("torch.") for value in cast.parameters()}
        dtypes[name] = {"found": sorted(found), "finite": bool(logits_of(cast, expected).isfinite().all())}
    same, different, faulty = filecmp.cmpfiles(first, second, names(first), shallow=False)
    code = "modeling_moe_vision.py"
    seen = {
        "refusals": said, "ran_code": ran_code, "dtypes": dtypes,
        "classes": {name: type(value).__name__ for name, value in made.items()},
        "modules": len({type(made[name]).__module__ for name in AUTO if name != "AutoTokenizer"}),
        "config_class": isinstance(model.config, type(model).config_class),
        "loading_info": {key: len(value) for key, value in info.items()},
        "difference": (logits_of(model, expected) - expected["logits"]).abs().max().item(),
        "after_saving": (logits_of(again, expected) - expected["logits"]).abs().max().item(),
        "beside": (logits_of(back, expected) - expected["logits"]).abs().max().item(),
        "files": names(first), "identical": sorted(same), "different": different + faulty,
        "same_code": (first / code).read_bytes() == Path(folder, code).read_bytes(),
        "saved_auto_map": json.loads((first / "config.json").read_text())["auto_map"],
        "other_class": type(beside) is type(model), "same_class_twice": type(back) is type(model),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "tied_by_config": model.config.tie_word_embeddings,
        "head_saved": "lm_head.weight" in load_file(first / "model.safetensors"),
    }  # fmt: skip
    print(f"\n{json.dumps(seen)}")  # below what transformers has asked and got no answer to


if __name__ == "__main__":
    main(*sys.argv[1:])
