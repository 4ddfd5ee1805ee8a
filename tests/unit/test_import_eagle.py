"""Importing an Eagle checkpoint folder: one of the published layout, made of golden weights and a tiny Llama."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moe_vision.cli import app
from moe_vision.evaluation import answer
from moe_vision.experts.weights import WeightsError
from moe_vision.interop import import_eagle
from moe_vision.interop.checkpoint import CheckpointError
from moe_vision.interop.eagle import composition
from moe_vision.interop.prompts import gap
from moe_vision.modeling.compose import load
from tests.published import LLAMA, tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "eagle"
CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
TOWERS = CASES["concat_x5"]["vision_tower"]
CASE = CASES["concat_x5"]["config"]
OVERRIDES = [
    f"experts.clip.architecture={json.dumps(CASE['clip'])}",
    "experts.convnext.architecture="
    + json.dumps({"hidden_sizes": CASE["convnext"]["dims"], "depths": CASE["convnext"]["depths"]}),
    "experts.sam.architecture="
    + json.dumps({k: CASE["sam"][k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                              "global_attn_indexes", "output_channels")} | {"mlp_dim": 64}),
    "experts.eva02.architecture={hidden_size: 32, depth: 3, num_heads: 2, window_size: 16, global_blocks: [2]}",
    f"experts.pix2struct.architecture={json.dumps(CASE['pix'])}",
]  # fmt: skip
TEXT = "\nwhat is this? ASSISTANT:"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM, torch.nn.Sequential]:
    """An Eagle folder in .bin shards, with the parts that it was made of."""
    folder = tmp_path_factory.mktemp("eagle")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    projector = torch.nn.Sequential(torch.nn.Linear(176, 48), torch.nn.GELU(), torch.nn.Linear(48, 48))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(4)
    vision = load_file(GOLDEN / "concat_x5_weights.safetensors")
    first = {f"model.vision_tower.{key}": value for key, value in vision.items()}
    second = {**llama.state_dict(), **{f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()}}
    torch.save(first, folder / "pytorch_model-00001-of-00002.bin")
    torch.save(second, folder / "pytorch_model-00002-of-00002.bin")
    weight_map = {key: f"pytorch_model-0000{i}-of-00002.bin" for i, part in ((1, first), (2, second)) for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = LLAMA | {
        "model_type": "eagle_llama", "architectures": ["EagleLlamaForCausalLM"], "mm_vision_tower": TOWERS,
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 176, "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad", "tokenizer_padding_side": "right", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    return folder, llama, projector


def test_logits_are_those_of_the_published_parts(published: Any, tmp_path: Path) -> None:
    folder, llama, projector = published
    result = CliRunner().invoke(
        app, ["import", "eagle", str(folder), "-o", str(tmp_path / "ours"), "--allow-bin", *OVERRIDES]
    )
    assert result.exit_code == 0, result.output
    assert "Now try: moe-vision generate" in result.output
    model, processor = load(tmp_path / "ours")
    picture = Image.open(GOLDEN / "img_1024.png")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)
    mine = AutoTokenizer.from_pretrained(folder)
    prompt = text.split("<image>")[0].removeprefix("<s>").lstrip()
    assert prompt.startswith("A chat between") and prompt.endswith("USER: ")
    before, after = (mine(piece, add_special_tokens=False)["input_ids"] for piece in (prompt, TEXT))
    with torch.no_grad():
        found = model(**inputs).logits
        words = llama.get_input_embeddings()
        visual = projector(load_file(GOLDEN / "concat_x5_io.safetensors")["output"][0])
        embedded = torch.cat([words(torch.tensor([1, *before])), visual, words(torch.tensor(after))])[None]
        expected = llama(inputs_embeds=embedded).logits
    assert found.shape[1] == 1 + len(before) + 1024 + len(after)
    torch.testing.assert_close(found[..., :90], expected, atol=2e-3, rtol=1e-3)


def test_it_answers_and_never_says_the_placeholder(published: Any, tmp_path: Path) -> None:
    model, processor = load(import_eagle(published[0], tmp_path / "ours", OVERRIDES, allow_bin=True))
    assert model.generation_config.suppress_tokens == [processor.image_token_id]
    text = answer(model, processor, "what is this?", [GOLDEN / "img_640x480.png"], max_new_tokens=4)
    assert "<image>" not in text


def test_safetensors_and_x4(published: Any, tmp_path: Path) -> None:
    source = tmp_path / "x4"
    source.mkdir()
    state: dict[str, torch.Tensor] = {}
    for file in sorted(published[0].glob("*.bin")):
        state |= torch.load(file, weights_only=True)
    renumbered = {}
    for key, value in state.items():
        for old, new in ((3, 2), (4, 3)):
            if f"vision_towers.{old}." in key:
                key = key.replace(f"vision_towers.{old}.", f"vision_towers.{new}.")
                break
        else:
            if "vision_towers.2." in key:
                continue
        renumbered[key] = value.clone()
    renumbered["model.mm_projector.0.weight"] = torch.ones(48, 144)
    save_file(renumbered, source / "model.safetensors")
    towers = "clip-448;convnext-1024;det-1024;pix2struct-1024"
    config = json.loads((published[0] / "config.json").read_text()) | {"mm_vision_tower": towers}
    (source / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(source)
    overrides = [override for override in OVERRIDES if not override.startswith("experts.sam")]
    model, _ = load(import_eagle(source, tmp_path / "ours", overrides))
    assert list(model.model.vision_tower.experts) == ["clip", "convnext", "eva02", "pix2struct"]


def test_the_composition_of_a_released_checkpoint(tmp_path: Path) -> None:
    config = {"mm_vision_tower": TOWERS, "mm_projector_type": "mlp2x_gelu", "hidden_size": 4096, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": "pad"}))
    model = composition(tmp_path)
    assert list(model.experts) == ["clip", "convnext", "sam", "eva02", "pix2struct"]
    assert model.experts["clip"].size == (336, 336) and model.experts["clip"].resize == "align_corners"
    assert sum(c.channels for c in model.branches.overview.mixer.adapted({n: e.shape for n, e in model.experts.items()}).values()) == 7680  # type: ignore[attr-defined]  # fmt: skip  # noqa: E501
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert composition(tmp_path).slicing.fit == "crop"  # type: ignore[attr-defined]


def test_what_is_not_eagle_is_refused(published: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json: give the folder of an Eagle checkpoint"):
        import_eagle(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps({"mm_vision_tower": "clip-448;dino-512"}))
    with pytest.raises(CheckpointError, match=r"mm_vision_tower holds \['dino-512'\].*known: clip-448"):
        import_eagle(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps({"mm_vision_tower": TOWERS, "mm_projector_type": "linear"}))
    with pytest.raises(CheckpointError, match="mm_projector_type is 'linear'"):
        import_eagle(tmp_path, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"tower 0' do not fit expert clip.*shapes .* instead of"):
        import_eagle(published[0], tmp_path / "out", allow_bin=True)  # full-size composition, miniature weights
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken' exists"):
        import_eagle(published[0], tmp_path / "taken", OVERRIDES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scheme", "space"), [("always", ""), ("first", " ")])
def test_prompts_hold_what_tokenises_piece_by_piece(scheme: str, space: str) -> None:
    llama = tokenizer()
    llama.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    llama.add_tokens(["<image>"], special_tokens=True)
    llama.image_token = "<image>"
    assert gap(llama) == space


def test_a_tokenizer_that_does_not_split_at_images_is_refused() -> None:
    llama = tokenizer()
    llama.add_tokens([AddedToken("<image>", rstrip=True, special=True)], special_tokens=True)
    llama.image_token = "<image>"
    with pytest.raises(CheckpointError, match=r"as LLaVA's does: fetch tokenizer\.model"):
        gap(llama)


def test_unusable_weights_are_named_as_published(published: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(published[0], source)
    key = "model.layers.0.mlp.up_proj.weight"
    states = {file: torch.load(file, weights_only=True) for file in source.glob("*.bin")}
    ((file, state),) = ((file, state) for file, state in states.items() if key in state)
    for change, problem in (
        (lambda weight: weight / 0, "are not finite"), (lambda weight: weight * 0, "is zero everywhere"),
        (lambda weight: weight.to(torch.int8), "is int8 instead of floating point"),
    ):  # fmt: skip
        torch.save({**state, key: change(state[key].clone())}, file)
        with pytest.raises(ValueError, match=rf"{file.name}': {key} .*{problem}"):
            import_eagle(source, tmp_path / "ours", OVERRIDES, allow_bin=True)
        assert not (tmp_path / "ours").exists()
