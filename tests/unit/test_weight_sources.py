"""Weights under every library's names, each against that library's own forward pass, and what is refused."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import segment_anything.modeling as segment_anything
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, ConvNextConfig, ConvNextModel, Pix2StructConfig, SamConfig, SamModel
from transformers import Pix2StructForConditionalGeneration as Pix2Struct

from moe_vision.experts import EXPERTS, Expert
from moe_vision.experts.weights import WeightsError, load_expert_weights, read_library
from tests.published import write_shards

PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "pretrained": None}
CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_stages": 4}
SAM = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "image_size": 96,
    "window_size": 4, "global_attn_indexes": [1], "output_channels": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """With no parameter left at zero or one, so that each has a say in the output."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def loaded(name: str, source: str, **settings: Any) -> Expert:
    expert: Expert = EXPERTS[name](**PLAIN, **settings).build().eval()
    load_expert_weights(expert, source)
    return expert


def stored(module: torch.nn.Module, tmp_path: Path, prefix: str = "") -> str:
    state = {prefix + key: value.clone().contiguous() for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def same(expert: Expert, expected: torch.Tensor, views: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(expert(views).data, expected, atol=2e-5, rtol=1e-4)


def clip(source: str, **settings: Any) -> Expert:
    return loaded("clip", source, variant="vit_large_patch14_336", architecture=CLIP, **settings)


def timm_clip() -> Any:
    return shaken(
        timm.create_model(
            "vit_base_patch16_clip_quickgelu_224", depth=2, embed_dim=32, num_heads=2, mlp_ratio=2, img_size=64,
            dynamic_img_size=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_clip_from_timm(tmp_path: Path, size: tuple[int, int]) -> None:
    model, views = timm_clip(), torch.rand(2, 3, *size)
    with torch.no_grad():
        (expected,) = model.forward_intermediates(views, indices=[1], norm=False, intermediates_only=True)
    same(clip(stored(model, tmp_path), image_size=size), expected, views)


def test_a_lower_layer_of_a_whole_checkpoint(tmp_path: Path) -> None:
    model, views = timm_clip(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        (expected,) = model.forward_intermediates(views, indices=[0], norm=False, intermediates_only=True)
    same(clip(stored(model, tmp_path), layer=-2), expected, views)


def test_clip_from_open_clip(tmp_path: Path) -> None:
    settings = CLIPVisionCfg(layers=2, width=32, head_width=16, mlp_ratio=2, patch_size=16, image_size=64)
    model = torch.nn.Module()
    model.visual = shaken(_build_vision_tower(24, settings, quick_gelu=True))
    model.positional_embedding = torch.nn.Parameter(torch.zeros(7, 5))  # the text encoder's, of the same name
    views = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found = model.visual.forward_intermediates(views, indices=[1], normalize_intermediates=False)
    same(clip(stored(model, tmp_path)), found["image_intermediates"][-1], views)


def test_clip_from_a_transformers_folder(tmp_path: Path) -> None:
    model: Any = shaken(CLIPModel(CLIPConfig(vision_config={**CLIP, "hidden_act": "quick_gelu"}, text_config={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1})))  # fmt: skip  # noqa: E501
    model.save_pretrained(tmp_path)
    views = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.vision_model(views, output_hidden_states=True).hidden_states[-1][:, 1:]
    same(clip(str(tmp_path)), expected.transpose(1, 2).unflatten(2, (4, 4)), views)


def convnext(source: str) -> Expert:
    architecture = CONVNEXT | {"layer_norm_eps": 1e-6}
    return loaded("convnext", source, variant="xxlarge_clip", architecture=architecture, image_size=(96, 64))


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_convnext_from_timm_and_open_clip(tmp_path: Path, prefix: str) -> None:
    model: Any = shaken(timm.create_model("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)))
    views = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        expected = model.norm_pre(model.stages(model.stem(views)))
    same(convnext(stored(model, tmp_path, prefix)), expected, views)


def test_convnext_from_a_transformers_folder(tmp_path: Path) -> None:
    model: Any = shaken(ConvNextModel(ConvNextConfig(**CONVNEXT)))
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    model.save_pretrained(tmp_path)
    views = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        same(convnext(str(tmp_path)), model(views).last_hidden_state, views)


def sam(source: str, **settings: Any) -> Expert:
    return loaded("sam", source, variant="vit_large", architecture=SAM, **settings)


def test_sam_from_segment_anything(tmp_path: Path) -> None:
    model = shaken(
        segment_anything.ImageEncoderViT(
            img_size=96, patch_size=16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, out_chans=16, window_size=4,
            use_rel_pos=True, global_attn_indexes=(1,), norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6),
        )
    )  # fmt: skip
    views = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        same(sam(stored(model, tmp_path, "image_encoder.")), model(views), views)


@pytest.mark.parametrize("size", [(96, 96), (160, 64), (48, 48)])
def test_sam_from_timm_at_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    model: Any = shaken(
        timm.create_model(
            "samvit_base_patch16", img_size=96, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, neck_chans=16,
            window_size=4, global_attn_indexes=(1,), num_classes=0,
        )
    )  # fmt: skip
    views = torch.rand(2, 3, *size)
    with torch.no_grad():
        same(sam(stored(model, tmp_path), image_size=size), model.forward_features(views), views)


def test_sam_from_a_transformers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = shaken(SamModel(SamConfig(vision_config=SAM)))
    model.save_pretrained(tmp_path)
    views = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        expected = model.vision_encoder(views).last_hidden_state
        same(sam(str(tmp_path)), expected, views)
        # In pieces of one query row as well: nothing depends on how much is held at a time.
        expert = sam(str(tmp_path))
        from moe_vision.experts import sam as module

        monkeypatch.setattr(module, "CACHED_BIAS", 100)
        same(expert, expected, views)


def test_sam_gradients_are_those_of_the_library(tmp_path: Path) -> None:
    model: Any = shaken(SamModel(SamConfig(vision_config=SAM)))
    expert, views = sam(stored(model, tmp_path)), torch.rand(2, 3, 96, 96)
    cotangent = torch.randn(2, 16, 6, 6)
    (expert(views).data * cotangent).sum().backward()
    (model.vision_encoder(views).last_hidden_state * cotangent).sum().backward()
    for key, parameter in model.vision_encoder.named_parameters():
        found = expert.get_parameter(f"model.vision_encoder.{key}").grad
        torch.testing.assert_close(found, parameter.grad, atol=1e-4, rtol=1e-3)


def test_pix2struct_from_a_transformers_folder(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "d_kv": 16, "d_ff": 40,
        "patch_embed_hidden_size": 768, "seq_len": 16,
    }  # fmt: skip
    text = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 40, "vocab_size": 8}
    Pix2Struct(Pix2StructConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path)
    settings = {"variant": "large", "image_size": (64, 96), "architecture": vision}
    expert = loaded("pix2struct", str(tmp_path), **settings)
    whole = Pix2Struct.from_pretrained(tmp_path)
    for key, value in whole.encoder.state_dict().items():
        assert torch.equal(expert.model.state_dict()[key], value)


def test_weights_by_a_librarys_name(tmp_path: Path) -> None:
    model: Any = shaken(timm.create_model("convnext_atto", num_classes=10))
    timm.models._hub.save_for_hf(model, tmp_path)
    state = read_library(f"timm:local-dir:{tmp_path}")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    with pytest.raises(WeightsError, match=r"timm cannot give these weights.*Unknown model"):
        read_library("timm:no_such_model")
    with pytest.raises(WeightsError, match=r"segment_anything:vit_x.*vit_l"):
        read_library("segment_anything:vit_x")
    with pytest.raises(WeightsError, match="has no tag: write open_clip:ARCHITECTURE/TAG"):
        read_library("open_clip:ViT-B-32")


def test_open_clip_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = read_library(f"open_clip:ViT-S-32-alt/{tmp_path / 'weights.pt'}")
    assert torch.equal(state["visual.conv1.weight"], model.state_dict()["visual.conv1.weight"])


def test_eva02_from_its_pickle(tmp_path: Path) -> None:
    architecture = {"hidden_size": 32, "depth": 2, "num_heads": 2, "global_blocks": [1]}
    settings = {"variant": "large_coco_det", "image_size": (64, 96), "architecture": architecture}
    source: Expert = EXPERTS["eva02"](**PLAIN, **settings).build()
    state = {f"backbone.net.{key}": value for key, value in source.model.state_dict().items()}
    state |= {"backbone.net.rope_win.freqs_cos": torch.zeros(4, 16), "roi_heads.box.weight": torch.zeros(3)}
    torch.save({"model": state}, tmp_path / "eva.pth")
    expert = loaded("eva02", str(tmp_path / "eva.pth"), **settings)
    views = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        same(expert, source.eval()(views).data, views)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "hook": print}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth' cannot be read"):
        clip(str(tmp_path / "evil.pth"))


def test_a_truncated_file(tmp_path: Path) -> None:
    path = Path(stored(timm_clip(), tmp_path))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"weights\.safetensors' cannot be read .*truncated"):
        clip(str(path))


def test_weights_of_another_family(tmp_path: Path) -> None:
    source = stored(timm_clip(), tmp_path)
    with pytest.raises(WeightsError, match=r"do not fit expert sam 'vit_large'.*missing vision_encoder\..*unexpected"):
        sam(source)


def test_weights_of_another_size_name_keys_and_shapes(tmp_path: Path) -> None:
    source = stored(timm_clip(), tmp_path)
    with pytest.raises(WeightsError, match=r"shapes .*\(32, 3, 16, 16\) instead of \(48, 3, 16, 16\)"):
        loaded("clip", source, variant="vit_large_patch14_336", architecture=CLIP | {"hidden_size": 48})


def test_nothing_is_loaded_from_weights_that_lack_a_key(tmp_path: Path) -> None:
    model = timm_clip()
    state = {key: value for key, value in model.state_dict().items() if key != "blocks.1.mlp.fc2.bias"}
    save_file(state, tmp_path / "partial.safetensors")
    expert: Expert = EXPERTS["clip"](**PLAIN, variant="vit_large_patch14_336", architecture=CLIP).build()
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    with pytest.raises(WeightsError, match=r"names of timm\): missing encoder\.layers\.1\.mlp\.fc2\.bias;"):
        load_expert_weights(expert, str(tmp_path / "partial.safetensors"))
    assert all(torch.equal(value, before[key]) for key, value in expert.state_dict().items())


def test_unknown_architecture_values_and_variants() -> None:
    with pytest.raises(ValueError, match="unknown architecture value 'hiden_size' of clip: did you mean 'hidden_size'"):
        EXPERTS["clip"](variant="micro", architecture={"hiden_size": 3})
    with pytest.raises(ValueError, match="unknown variant 'vit_larg' of sam: did you mean 'vit_large'"):
        EXPERTS["sam"](variant="vit_larg")


def test_a_folder_is_read_by_its_index(tmp_path: Path) -> None:
    expert = EXPERTS["clip"](variant="micro", pretrained=None).build()
    state = expert.state_dict()
    write_shards(tmp_path, state)
    save_file({key: value + 1 for key, value in state.items()}, tmp_path / "model-00001-of-00002_old.safetensors")
    torch.save({key: value + 1 for key, value in state.items()}, tmp_path / "pytorch_model.bin")
    other = EXPERTS["clip"](variant="micro", pretrained=None).build()
    load_expert_weights(other, str(tmp_path))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in expert.state_dict().items())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"index\.json' lists 'model-00002-of-00002\.safetensors', which is not in"):
        load_expert_weights(other, str(tmp_path))
