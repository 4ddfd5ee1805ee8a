"""Exports on other versions of transformers, and in lmms-eval and vLLM themselves, each in an environment of its own.

    python -m tests.export.versions                                 # transformers 5.16.1, 5.20.0 and 5.23.0
    python -m tests.export.versions --transformers 5.18.0
    python -m tests.export.versions --transformers --engines lmms-eval vllm

The folders are made once, by the environment that runs this. Others are made in a temporary folder: torch and whatever
else they do not install themselves they find in the running environment. Prints a table; ends with 1 if anything fails.
Needs network for pip; vLLM is a download of 340 MB.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_vision.config import load_config
from moe_vision.export import export
from moe_vision.modeling.compose import compose, save
from moe_vision.modeling.model_config import ModelConfig, packaged_config
from tests.export.isolated import SCRIPTS, isolated, isolated_environment
from tests.export.test_auto import expected_of
from tests.export.test_consumers import server
from tests.export.test_engines import SELECTOR, SLICED, check_contract, save_engine_folders
from tests.export.test_generation import check as check_generation
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
VERSIONS = ("5.16.1", "5.20.0", "5.23.0")
ENGINES = {
    "lmms-eval": """
        lmms-eval==0.7.3 loguru pytz evaluate sacrebleu portalocker tabulate colorama lxml tenacity python-dotenv
    """,
    "vllm": """
        vllm==0.33.0 transformers==5.20.0 anthropic apache-tvm-ffi==0.1.11 blake3 cachetools cbor2 cloudpickle
        compressed-tensors==0.17.0 depyf==0.20.0 distro fastapi==0.133.0 gguf ijson interegular lark llguidance
        lm-format-enforcer==0.11.3 loguru mcp mistral-common msgspec ninja opencv-python-headless openai jiter sniffio
        orjson oss-harmony outlines-core==0.2.14 partial-json-parser prometheus-client
        prometheus-fastapi-instrumentator psutil py-cpuinfo pybase64 pycountry pydantic-extra-types pydantic-settings
        python-json-logger pyzmq sentencepiece setproctitle starlette tiktoken uvloop watchfiles xgrammar==0.2.8
    """,
}
"""What pip installs for each, without what these depend on: that is the CUDA toolkit, or is there already."""


def environment(folder: Path, *arguments: str) -> str:
    """The interpreter of a new environment, in which pip has installed; behind its own packages it sees the running
    one's.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    home = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(home.strip(), "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    quiet = ["--quiet", "--no-warn-conflicts", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *quiet, *arguments], check=True)
    return str(python)


def make_folders(home: Path) -> dict[str, Path]:
    """Exports of the micro preset and of a tiny model, and folders as engines are asked, by name."""
    torch.manual_seed(0)
    save(*compose(load_config(ModelConfig, packaged_config("model/micro.yaml"))), home / "micro-model")
    save(*tiny_model(("clip", "sam")), home / "tiny-model")
    for name in ("micro", "tiny"):
        export(home / f"{name}-model", home / name)
        expected_of(home / f"{name}-model", home / f"{name}.safetensors")
    return {"micro": home / "micro", "tiny": home / "tiny", **save_engine_folders(home)}


def check_auto_classes(seen: dict[str, Any]) -> None:
    """Of what scripts/auto_classes.py saw: what has to hold on every version."""
    refusals = {name: said for name, said in seen["refusals"].items() if name != "AutoTokenizer"}  # runs no code
    assert set(refusals.values()) == {"ValueError: True"} and len(refusals) == 6 and not seen["ran_code"]
    assert seen["classes"]["AutoModel"] == "MoeVisionModel" and len(seen["classes"]) == 7
    assert seen["modules"] == 1 and not any(seen["loading_info"].values())
    assert max(seen["difference"], seen["after_saving"], seen["beside"]) <= 1e-5
    assert seen["different"] == [] and seen["identical"] == seen["files"] and seen["same_code"]


def on_transformers(python: str, folders: dict[str, Path], work: Path) -> dict[str, Callable[[], str]]:
    """Checks of one version, by name; each says what it found, or raises AssertionError."""

    def auto(name: str, other: str) -> str:
        arguments = (folders[name], folders[other], folders[name].with_suffix(".safetensors"), work / name)
        seen = isolated("auto_classes", *arguments, home=work / "home", python=python)
        check_auto_classes(seen)
        return f"seven classes; logits differ by {seen['difference']:.1g}"

    def generation(name: str) -> str:
        seen = isolated("generation", folders[name], home=work / "home", python=python)
        check_generation(seen)
        error = max(abs(a - b) for a, b in zip(seen["beam_scores"], seen["rescored"], strict=True))
        return f"batched, uncached and static alike; beams of two images off by {error:.1g}"

    def contract() -> str:
        seen = isolated("vllm_contract", *folders.values(), home=work / "home", python=python)
        by_name = dict(zip(folders, seen, strict=True))
        assert "branches.selector" in by_name.pop(SELECTOR)["refused"]
        for found in by_name.values():
            check_contract(found)
        return f"{len(by_name)} folders; logits differ by {max(found['difference'] for found in by_name.values()):.1g}"

    checks = {f"auto classes, {name}": lambda name=name, other=other: auto(name, other)
              for name, other in (("micro", "tiny"), ("tiny", "micro"))}  # fmt: skip
    checks |= {
        f"generation, {name}": lambda name=name: generation(name) for name in ("micro", "tiny", *SLICED, SELECTOR)
    }
    return {**checks, "contract of vLLM": contract}


def in_vllm(python: str, folders: dict[str, Path], work: Path) -> str:
    seen = isolated("vllm_itself", *folders.values(), home=work / "home", python=python)
    by_name = dict(zip(folders, seen, strict=True))
    assert "branches.selector" in by_name.pop(SELECTOR)["refused"]
    for found in by_name.values():
        assert found["class"] == "TransformersMultiModalForCausalLM"
        assert found["content_format"] == "openai"  # turns reach the template with their images as parts
        assert found["attention_layers"] == list(range(found["layers"])) and found["dummy"] == 2
        assert all(found["same_ids"]) and all(made == said for request in found["counts"] for made, said in request)
        assert max(found["differences"]) < 1e-3 and found["difference_alone"] < 1e-5
    return f"{len(by_name)} folders; logits differ by {max(max(f['differences']) for f in by_name.values()):.1g}"


def in_lmms_eval(python: str, folders: dict[str, Path], work: Path) -> str:
    """The plug-in, which needs moe_vision, so that there is no barrier; and its client of a server that has one."""

    def seen(script: str, *arguments: object) -> dict[str, Any]:
        command = [python, str(SCRIPTS / f"{script}.py"), *map(str, arguments)]
        variables = isolated_environment(work / "home")
        ended = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
        found: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
        return found

    by_plugin = seen("lmms_eval_itself", folders["micro"])
    assert by_plugin["bases"] == ["Huggingface", "lmms"] and by_plugin["answers"] == by_plugin["expected"]
    one_picture, _, no_picture = by_plugin["answers"]
    assert one_picture != no_picture
    with server(folders["micro"], work / "server") as address:
        by_server = seen("lmms_eval_asks_server", folders["micro"], address)
    assert by_server["answers"] == [one_picture, no_picture]
    return f"--model moe_vision answers {by_plugin['answers']}, --model openai on `transformers serve` the same"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", nargs="*", default=VERSIONS, help="versions of transformers")
    parser.add_argument("--engines", nargs="*", default=(), choices=ENGINES, help="engines to run")
    options = parser.parse_args()
    rows: list[tuple[str, str, str]] = []

    def tried(where: str, what: str, check: Callable[[], str]) -> None:
        try:
            rows.append((where, what, check()))
        except (AssertionError, subprocess.CalledProcessError):
            traceback.print_exc()
            rows.append((where, what, "FAILED"))
        print(*rows[-1], sep=" | ", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        folders = make_folders(home)
        for version in options.transformers:
            work = home / version
            python = environment(work / "env", f"transformers=={version}")
            for what, check in on_transformers(python, folders, work).items():
                tried(f"transformers {version}", what, check)
        for engine, run in {"lmms-eval": in_lmms_eval, "vllm": in_vllm}.items():
            if engine in options.engines:
                work = home / engine
                plug_in = ("-e", str(ROOT)) if engine == "lmms-eval" else ()
                python = environment(work / "env", "--no-deps", *ENGINES[engine].split(), *plug_in)
                tried(engine, "itself", lambda run=run, python=python, work=work: run(python, folders, work))
    print("", *(" | ".join(row) for row in rows), sep="\n")
    return int(any(outcome == "FAILED" for *_, outcome in rows))


if __name__ == "__main__":
    sys.exit(main())
