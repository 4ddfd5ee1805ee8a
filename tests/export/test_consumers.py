"""What people do with an exported folder, without moe_vision: ask, serve, speed up, quantise and train it."""

import base64
import io
import json
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from moe_vision.modeling.compose import load
from tests.export.conftest import Exported
from tests.export.isolated import isolated, isolated_command, isolated_environment
from tests.export.scripts.folder import picture, prompt

QUESTION = "What is in the picture?"


def test_pipelines_say_what_generate_says(exported: Exported, tmp_path: Path) -> None:
    """Whatever form the pictures come in; a chat template's mask holds the answers, across expanded pictures."""
    report = isolated("asks_by_pipeline", exported.folder, home=tmp_path)
    assert len(report["answers"]) == 14
    for form, (answer, expected) in report["answers"].items():
        assert answer == expected != "", form
    assert len(set(report["expected"].values())) == 5  # or else a picture more or less would go unseen
    assert report["half_dtype"] == "torch.bfloat16"
    # Of the pipeline itself, or, on older versions, of the model.
    assert re.search("number of <image> tokens|0 image placeholders .* the images give", report["refusal"])

    conversation = report["conversation"]
    assert {"input_ids", "attention_mask", "pixel_values"} <= set(conversation["names"])
    assert conversation["images"] == 2
    assert conversation["image_tokens"] == conversation["expected_image_tokens"] > 2
    # The tokenizer puts a space before every piece of text behind a special token.
    assert conversation["assistant"] == " a red circle</s> no, two rows of 12 squares</s>"


@contextmanager
def server(folder: Path | None, home: Path, seconds: float = 300) -> Iterator[str]:
    """Address of `transformers serve`, once it answers; killed at the end in any case. Without a folder it loads the
    one that a request names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = ("--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", port)
    command = isolated_command("transformers_command", "serve", *([] if folder is None else [folder]), *options)
    home.mkdir(parents=True)
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=home, env=isolated_environment(home), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + seconds
        while not answers(f"{address}/health"):
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, f"the server did not start:\n{(home / 'log').read_text()[-6000:]}"
            time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    """Whether there is a server yet."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except OSError:
        return False
    return True


def ask(address: str, folder: Path, content: Any, **options: Any) -> str:
    """What /v1/chat/completions answers to a user's turn; anything but a success raises."""
    messages = [{"role": "user", "content": content}]
    body = {"model": str(folder), "messages": messages, "max_tokens": 8, "temperature": 0, **options}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        text: str = response.read().decode()
    return text


def about(image: Image.Image, **options: Any) -> list[dict[str, Any]]:
    """The question about an image, which is sent as a PNG file."""
    stored = io.BytesIO()
    image.save(stored, "PNG", **options)
    uri = f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]


def own_answers(source: Path) -> list[tuple[str, int]]:
    """What generate() of the exported model answers without a picture and with one, and the tokens of the prompts."""
    model, processor = load(source)
    found = []
    for images in ([], [picture(0)]):
        inputs = processor(images=images, text=prompt(processor, QUESTION, len(images)), return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        found.append((processor.decode(output[0, length:], skip_special_tokens=True), length))
    return found


def test_transformers_serve_answers_chats(micro: Exported, tmp_path: Path) -> None:
    """As generate() does, with an image, without one, with one that is stored sideways, and as a stream."""
    seen = about(picture(0))
    exif = Image.Exif()
    exif[274] = 6  # a phone's: to be shown turned by a quarter, clockwise
    phone = about(picture(0).transpose(Image.Transpose.ROTATE_90), exif=exif)
    with server(micro.folder, tmp_path / "server") as address:
        replies = [json.loads(ask(address, micro.folder, content)) for content in (QUESTION, seen)]
        turned = json.loads(ask(address, micro.folder, phone))
        stream = ask(address, micro.folder, seen, stream=True)

    texts = [reply["choices"][0]["message"]["content"] for reply in replies]
    lengths = [reply["usage"]["prompt_tokens"] for reply in replies]
    assert list(zip(texts, lengths, strict=True)) == own_answers(micro.source)
    assert len(set(texts)) == 2
    assert turned["choices"][0]["message"]["content"] == texts[1]

    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == texts[1]
    assert choices[-1]["finish_reason"] == replies[1]["choices"][0]["finish_reason"]


def test_attention_implementations_give_equal_logits(micro: Exported, tmp_path: Path) -> None:
    """Asked for on loading or set afterwards; flash attention, which is not installed here, is refused."""
    report = isolated("changes_attention", micro.folder, home=tmp_path)
    assert report["flash_refused"] == {"loading": True, "setting": True}
    assert [found["implementation"] for found in report["loaded"].values()] == list(report["loaded"])
    assert [found["implementation"] for found in report["changed"]] == [
        "sdpa", "flex_attention", "eager", "flex_attention", "sdpa", "eager",
    ]  # fmt: skip
    for found in [*report["loaded"].values(), *report["changed"]]:
        assert found["flex"] == (found["implementation"] == "flex_attention")
        assert found["difference"] <= 1e-5  # measured: 6e-7


def test_tower_and_model_compile_to_one_graph_each(tiny: Exported, tmp_path: Path) -> None:
    report = isolated("compiles", tiny.folder, home=tmp_path)
    for found in report.values():
        assert found["graphs"] == 1
        assert found["difference"] <= 1e-4
    # The model's graph holds the tower's, and a language model of two layers.
    assert report["model"]["operations"] > report["tower"]["operations"] + 100


def test_layers_on_disk_and_recomputed_activations_change_nothing(micro: Exported, tmp_path: Path) -> None:
    """Logits with decoder layers on disk; gradients of every parameter where each expert runs again backwards."""
    report = isolated("saves_memory", micro.folder, tmp_path / "disk", home=tmp_path)
    assert report["automatic"] == {"difference": 0, "on_disk": []}
    assert report["on_disk"]["difference"] == 0
    assert {"model.language_model.layers.1", "model.language_model.layers.2"} <= set(report["on_disk"]["on_disk"])

    assert report["without"] == {"recomputed": {}, "missing": []}
    checkpointed = [report[way] for way in report["ways"]]
    assert checkpointed
    for found in checkpointed:
        assert found["difference"] <= 1e-5  # relative to each parameter's largest gradient; measured: 0
        assert set(found["recomputed"]) == {*report["experts"], "language_model"}
        assert min(found["recomputed"].values()) >= 9  # three layers of at least three matrices each


def test_torchao_quantises_the_language_model_alone(micro: Exported, tmp_path: Path) -> None:
    """To 8 and to 4 bits: logits stay near those of fp32, and saving changes nothing."""
    report = isolated("quantises", micro.folder, tmp_path / "saved", home=tmp_path)
    for kind, bound in {"int8": 0.02, "int4": 0.2}.items():  # measured: 0.0084 and 0.087
        found = report[kind]
        assert 0 < found["error"] < bound
        assert found["quantised"] == found["quantised_after_saving"] == report["linear_layers"]
        assert found["others_changed"] == []
        assert found["difference_after_saving"] == 0
    assert report["int8"]["error"] < report["int4"]["error"]


def test_trl_fine_tunes_the_folder(tiny: Exported, tmp_path: Path) -> None:
    """On questions about one picture, two and none; what it saves is a whole folder again."""
    report = isolated("fine_tunes", tiny.folder, tmp_path / "runs", home=tmp_path)
    for losses in (report["losses"], report["losses_of_answers"]):
        assert len(losses) == 3
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 1  # measured: -1.6 on all words, -2.6 on answers
    assert report["finite"]
    assert report["moved"] == ["language_model", "multi_modal_projector", "vision_tower"]
    assert set(report["missing_files"]) <= {"README.md"}
    assert report["same_code"]
    assert report["auto_maps"][0] == report["auto_maps"][1]
    assert report["difference"] == 0


def test_adapters_train_and_merge(tiny: Exported, tmp_path: Path) -> None:
    """LoRA of the language model alone: saved adapters and merged weights give the trained model's logits."""
    report = isolated("trains_adapters", tiny.folder, tmp_path / "saved", home=tmp_path)
    assert report["losses"] == sorted(report["losses"], reverse=True)
    assert report["losses"][-1] < report["losses"][0] - 1  # measured: -2.3
    assert len(report["with_gradient"]) == 2 * len(report["linear_layers"])
    assert all(".language_model." in name and ".lora_" in name for name in report["with_gradient"])
    assert report["learnt"] > 1  # measured: 7.8
    assert set(report["differences"]) == {
        "adapters on the model", "adapters by Auto class", "merged", "merged and saved",
    }  # fmt: skip
    for way, difference in report["differences"].items():
        assert difference <= 1e-4, way  # measured: 1.2e-5 where merged, or else 0
    assert report["changed"] == report["linear_layers"]
    assert report["same_code"]
    assert report["auto_maps"][0] == report["auto_maps"][1]
