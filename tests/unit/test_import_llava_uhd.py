"""Importing a LLaVA-UHD checkpoint folder: one of the published layout, made of golden weights and a tiny Llama."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moe_vision.cli import app
from moe_vision.experts.weights import WeightsError
from moe_vision.interop import import_llava_uhd
from moe_vision.interop.checkpoint import CheckpointError
from moe_vision.interop.llava_uhd import composition
from moe_vision.modeling.compose import load
from moe_vision.modeling.image_processing_moe_vision import join_views
from tests.published import LLAMA, tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "uhd"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CLIP = MANIFEST["adapt_clip"]["config"]
ARCHITECTURE = {
    "hidden_size": CLIP["hidden"], "intermediate_size": CLIP["inter"], "num_hidden_layers": CLIP["layers"],
    "num_attention_heads": CLIP["heads"], "image_size": CLIP["image_size"], "patch_size": CLIP["patch"],
}  # fmt: skip
OVERRIDES = [
    f"experts.clip.architecture={json.dumps(ARCHITECTURE)}",
    "experts.clip.image_size=[112, 112]",
    "experts.clip.mean=[0, 0, 0]",
    "experts.clip.std=[1, 1, 1]",
    "slicing.scale_resolution=112",
    "branches.overview.adapter.num_queries=16",
    "branches.overview.adapter.num_heads=2",
]
"""What makes the released composition as small as the golden weights, which take pixels as they are."""

CONFIG = {
    "model_type": "llava_llama", "mm_vision_tower": "/models/openai/clip-vit-large-patch14-336",
    "mm_projector_type": "adapt_spatial_resampler_v1", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A LLaVA-UHD folder that holds its CLIP, with the language model in it."""
    folder = tmp_path_factory.mktemp("uhd")
    torch.manual_seed(0)
    values = LLAMA | {"hidden_size": 16, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**values)).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(4)
    clip = load_file(GOLDEN / "adapt_clip_weights.safetensors")
    parts = load_file(GOLDEN / "spatial_schema.safetensors")
    state = {f"model.vision_tower.vision_tower.{key}": value for key, value in clip.items()}
    state |= {f"model.mm_projector.{k.removeprefix('proj.')}": v for k, v in parts.items() if k.startswith("proj.")}
    save_file({**state, **llama.state_dict()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values | CONFIG))
    tokenizer().save_pretrained(folder)
    return folder, llama


def without_clip(folder: Path, there: Path) -> Path:
    """A copy of a published folder that leaves CLIP to its authors' checkpoint, as the released ones do."""
    there.mkdir()
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "vision_tower" not in k}, there / "model.safetensors")
    (there / "config.json").write_text((folder / "config.json").read_text())
    tokenizer().save_pretrained(there)
    return there


@torch.no_grad()
@pytest.mark.parametrize("number", range(4))
def test_logits_are_those_of_the_published_parts(published: Any, number: int, tmp_path: Path) -> None:
    folder, llama = published
    result = CliRunner().invoke(app, ["import", "llava-uhd", str(folder), "-o", str(tmp_path / "ours"), *OVERRIDES])
    assert result.exit_code == 0, result.output
    model, processor = load(tmp_path / "ours")

    case, values = MANIFEST["spatial_schema"]["cases"][number], load_file(GOLDEN / "spatial_schema.safetensors")
    width, height = case["image_wh"]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    picture = Image.new("RGB", (width, height))
    inputs = processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)
    views = [*(values[f"c{number}_slices"] if case["grid"] else []), values[f"c{number}_source"]]
    assert inputs["pixel_values"].shape == join_views(views).shape
    found = model(**{**inputs, "pixel_values": join_views(views)}).logits

    # The published prompt of token ids around one image: the same, with the miniature's ids of "," and "\n".
    features, grid = values[f"c{number}_features"], case["grid"]
    words, vocabulary = llama.get_input_embeddings(), tokenizer()
    end_of_row, end_of_slice = (vocabulary.convert_tokens_to_ids(token) for token in ("\n", ","))
    rows = []
    for i, tokens in enumerate(features):
        rows.append(tokens)
        if i < len(features) - 1:
            ends = case["ind_tokens"][i] == 13
            rows.append(words(torch.tensor([end_of_row if ends else end_of_slice])))
    assert len(case["ind_tokens"]) == len(features) - 1 and bool(grid) == (len(features) > 1)
    visual = torch.cat(rows)
    ids = inputs["input_ids"][0]
    start, count = (ids == processor.image_token_id).nonzero()[0].item(), (ids == processor.image_token_id).sum()
    assert count == len(visual)
    embedded = torch.cat([words(ids[:start]), visual, words(ids[start + count :])])[None]
    torch.testing.assert_close(found[..., :90], llama(inputs_embeds=embedded).logits, atol=1e-3, rtol=1e-3)


def test_clip_comes_from_its_own_checkpoint(published: Any, tmp_path: Path) -> None:
    source = without_clip(published[0], tmp_path / "source")
    clip = tmp_path / "clip"
    clip.mkdir()
    save_file(load_file(GOLDEN / "adapt_clip_weights.safetensors"), clip / "model.safetensors")
    import_llava_uhd(source, tmp_path / "ours", [*OVERRIDES, f"experts.clip.pretrained={clip}"])
    import_llava_uhd(published[0], tmp_path / "theirs", OVERRIDES)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(WeightsError, match=r"holds no CLIP: give experts\.clip\.pretrained"):
        import_llava_uhd(source, tmp_path / "none", [*OVERRIDES, "experts.clip.pretrained=null"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "queries", "layer", "image_size"),
    [
        ({}, 144, -2, (336, 336)),
        ({"mm_projector_type": "uhd_v1_query64"}, 64, -2, (336, 336)),
        ({"mm_vision_select_layer": -1}, 144, -1, (336, 336)),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, 144, -2, (224, 224)),
    ],
)
def test_the_composition_of_a_released_checkpoint(
    changes: dict[str, Any], queries: int, layer: int, image_size: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 5120, "vocab_size": 32000} | CONFIG | changes))
    model = composition(tmp_path)
    adapter: Any = model.branches.overview.adapter
    assert (adapter.num_queries, adapter.align, adapter.heads(5120)) == (queries, "reference", 40)
    assert model.experts["clip"].layer == layer and model.experts["clip"].size == image_size
    assert model.branches.shared and model.slicing.to_dict()["max_slices"] == 7


def test_what_is_not_llava_uhd_is_refused(published: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json: give the folder of a LLaVA-UHD checkpoint"):
        import_llava_uhd(tmp_path, tmp_path / "out")
    for changes, cause in (
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type is 'mlp2x_gelu', which is no resampler"),
        ({"mm_vision_tower": "google/siglip-so400m"}, "mm_vision_tower ends with 'siglip-so400m'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
        with pytest.raises(CheckpointError, match=cause):
            import_llava_uhd(tmp_path, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"do not fit expert clip.*shapes .* instead of"):
        import_llava_uhd(published[0], tmp_path / "out", OVERRIDES[3:])  # a full-size CLIP, miniature weights
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken' exists"):
        import_llava_uhd(published[0], tmp_path / "taken", OVERRIDES)
    assert not (tmp_path / "out").exists()


def test_a_projector_with_a_part_missing_is_refused(published: Any, tmp_path: Path) -> None:
    source = without_clip(published[0], tmp_path / "source")
    state = load_file(published[0] / "model.safetensors")
    del state["model.mm_projector.ln_post.weight"]
    save_file(state, source / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lack \['ln_post\.weight'\] of the resampler"):
        import_llava_uhd(source, tmp_path / "out", OVERRIDES)
