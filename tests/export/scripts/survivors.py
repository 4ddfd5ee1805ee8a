"""FOLDERS: one with a model folder and expected.safetensors for each composition. Prints the difference of each."""

import json
import sys
from pathlib import Path

import torch
from folder import loaded
from safetensors.torch import load_file


def main(folders: str) -> None:
    differences = {}
    for home in sorted(Path(folders).iterdir()):
        model = loaded(str(home / "model"))[0]
        expected = load_file(home / "expected.safetensors")
        torch.manual_seed(0)  # which a selector at random draws from
        with torch.inference_mode():
            logits = model(**{name: value for name, value in expected.items() if name != "logits"}).logits
        differences[home.name] = (logits - expected["logits"]).abs().max().item()
    print(json.dumps(differences))


if __name__ == "__main__":
    main(*sys.argv[1:])
