"""Importing a SliME checkpoint folder: one of the published layout, made of golden weights, a tiny CLIP and Llama."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from moe_vision.cli import app
from moe_vision.experts.weights import WeightsError
from moe_vision.export import export
from moe_vision.interop import import_slime
from moe_vision.interop.checkpoint import CheckpointError
from moe_vision.interop.slime import composition
from moe_vision.modeling.compose import load
from tests.published import LLAMA, llama3_tokenizer, tokenizer
from tests.sliced import pictures

GOLDEN = Path(__file__).parents[1] / "golden" / "slime"
ARCHITECTURE = {"hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OVERRIDES = [f"experts.clip.architecture={json.dumps(ARCHITECTURE)}"]
CONFIG = {
    "model_type": "llava_llama", "mm_vision_tower": "/models/openai/clip-vit-large-patch14-336",
    "mm_projector_type": "gated", "mm_resampler_type": "cosine", "mm_resampler_topp": 0.6, "mm_resampler_temp": 1.0,
    "mm_resampler_dim": 16, "mm_learnable_gated": -1, "mm_patch_merge_type": "spatial", "image_aspect_ratio": "anyres",
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
    "use_local_only": False, "use_global_only": False, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPVisionModel, LlamaForCausalLM]:
    """A SliME folder, and the library's own CLIP and Llama with its weights."""
    return write(tmp_path_factory.mktemp("slime"), tokenizer(), LLAMA["vocab_size"])


def write(
    folder: Path, words: PreTrainedTokenizerFast, size: int, **settings: Any
) -> tuple[Path, CLIPVisionModel, LlamaForCausalLM]:
    """Write a SliME folder with this tokenizer and a language model of `size` tokens; settings: of config.json."""
    torch.manual_seed(0)
    values = LLAMA | {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": size}
    llama = LlamaForCausalLM(LlamaConfig(**values, **settings)).eval()
    clip = CLIPVisionModel(CLIPVisionConfig(**ARCHITECTURE, image_size=336, patch_size=14)).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(4)
    parts = load_file(GOLDEN / "encode_images_weights.safetensors")
    state = {f"model.vision_tower.vision_tower.vision_model.{k.removeprefix('vision_model.')}": v
             for k, v in clip.state_dict().items()}  # fmt: skip
    state |= {f"model.{key}": value for key, value in parts.items() if not key.startswith("embed_tokens")}
    save_file({**state, **llama.state_dict()}, folder / "model.safetensors")
    separator = words(",", add_special_tokens=False)["input_ids"][-1]
    (folder / "config.json").write_text(json.dumps(values | CONFIG | settings | {"seperator": separator}))
    words.save_pretrained(folder)
    return folder, clip, llama


@torch.no_grad()
def test_a_llama_3_folder(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    words = llama3_tokenizer()
    folder, _, llama = write(tmp_path / "source", words, len(words), rope_theta=500000.0)
    model, processor = load(import_slime(folder, tmp_path / "ours", OVERRIDES))
    ids = torch.randint(len(words), (1, 300))
    torch.testing.assert_close(model(ids).logits[..., : len(words)], llama(ids).logits, atol=1e-5, rtol=1e-5)
    end = words.convert_tokens_to_ids("<|eot_id|>")
    assert {end, words.eos_token_id} <= set(model.generation_config.eos_token_id)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    assert text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat")


@torch.no_grad()
def test_logits_are_those_of_the_published_parts(published: Any, tmp_path: Path) -> None:
    folder, clip, llama = published
    result = CliRunner().invoke(app, ["import", "slime", str(folder), "-o", str(tmp_path / "ours"), *OVERRIDES])
    assert result.exit_code == 0, result.output
    model, processor = load(tmp_path / "ours")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=text, images=pictures([(400, 500)]), return_tensors="pt", add_special_tokens=False)
    found = model(**inputs)

    # The published computation: CLIP's last layer but one, the golden maths, the older selector over the whole prompt.
    expert = model.model.vision_tower.experts["clip"]
    features = clip(expert.pixels(inputs["pixel_values"]), output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(expert(inputs["pixel_values"]).data.flatten(2).transpose(1, 2), features,
                               atol=1e-4, rtol=1e-4)  # fmt: skip
    words = llama.get_input_embeddings()
    ids = inputs["input_ids"][0]
    places = (ids == processor.image_token_id).nonzero()[:, 0]
    assert len(places) == 576 + 1 + 32
    encoded = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    visual = encoded.pooler_output[0]
    torch.testing.assert_close(
        visual[576], words(torch.tensor(json.loads((folder / "config.json").read_text())["seperator"]))
    )
    others = words(ids[ids != processor.image_token_id])
    scores = torch.cosine_similarity(visual[577:, None], others[None], dim=-1).sum(-1)
    shares = (scores / 0.5).softmax(-1).softmax(-1).sort(descending=True)
    keep = shares.indices[: (shares.values.cumsum(-1) <= 0.6).sum() + 1].sort().values
    assert 0 < len(keep) < 32
    prompt = [words(ids[: places[0]]), visual[:577], visual[577:][keep], words(ids[places[-1] + 1 :])]
    expected = llama(inputs_embeds=torch.cat(prompt)[None]).logits[0, -1]
    torch.testing.assert_close(found.logits[0, -1, :90], expected, atol=1e-3, rtol=1e-3)
    report = export(tmp_path / "ours", tmp_path / "folder")
    assert report.max_difference == 0


def test_clip_comes_from_its_own_checkpoint(published: Any, tmp_path: Path) -> None:
    folder, clip, _ = published
    source = tmp_path / "source"
    source.mkdir()
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "vision_tower" not in k}, source / "model.safetensors")
    (source / "config.json").write_text((folder / "config.json").read_text())
    tokenizer().save_pretrained(source)
    clip.save_pretrained(tmp_path / "clip")
    import_slime(source, tmp_path / "ours", [*OVERRIDES, f"experts.clip.pretrained={tmp_path / 'clip'}"])
    import_slime(folder, tmp_path / "theirs", OVERRIDES)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_composition_of_a_released_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"hidden_size": 4096, "vocab_size": 32000} | CONFIG | {"mm_resampler_dim": 144, "mm_learnable_gated": 1}
        )
    )
    config = composition(tmp_path)
    mixture: Any = config.branches.overview.adapter
    assert config.branches.slices is not None
    compressor: Any = config.branches.slices.adapter
    assert (mixture.only, mixture.published_noise, mixture.half_positions) == ("resampler", True, True)
    assert (compressor.num_queries, compressor.projector, compressor.half_positions) == (144, "overview", True)
    assert config.branches.selector is not None
    assert config.branches.selector.to_dict() == {
        "type": "published", "top_p": 0.6, "temperature": 1.0, "reduce": "sum", "double_softmax": True,
    }  # fmt: skip
    assert config.experts["clip"].layer == -2 and config.slicing.to_dict()["max_tiles"] == 6


def test_what_is_not_slime_is_refused(published: Any, tmp_path: Path) -> None:
    folder = published[0]
    with pytest.raises(CheckpointError, match=r"has no config\.json: give the folder of a SliME checkpoint"):
        import_slime(tmp_path, tmp_path / "out")
    for changes, cause in (
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type is 'mlp2x_gelu', which SliME never had"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        ({"use_global_only": True}, "use_global_only is True"),
        ({"mm_learnable_gated": 2}, "mm_learnable_gated is 2"),
        ({"mm_vision_tower": "google/siglip-so400m"}, "mm_vision_tower ends with 'siglip-so400m'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
        with pytest.raises(CheckpointError, match=cause):
            import_slime(tmp_path, tmp_path / "out")
    values = json.loads((folder / "config.json").read_text())
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"seperator": 5}))
    with pytest.raises(CheckpointError, match=r"seperator is token 5 .* give slicing\.separator=TEXT"):
        import_slime(tmp_path, tmp_path / "out", OVERRIDES)
    state = load_file(folder / "model.safetensors")
    del state["model.mm_projector.w_gate"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lack \['w_gate'\] of the gated mixture"):
        import_slime(tmp_path, tmp_path / "out", OVERRIDES)
    with pytest.raises(FileExistsError, match="exists: give another folder"):
        import_slime(folder, tmp_path, OVERRIDES)
    assert not (tmp_path / "out").exists()
