"""Folders as they are published: old rotary settings, shards with leftovers, pickles, bf16, `tokenizer.model` alone.

The reference is transformers' own Llama, loaded from the same folder, and SentencePiece's own processor.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from moe_vision.cli import app
from moe_vision.modeling.compose import load, load_tokenizer
from tests.published import (
    UHD_CONFIG,
    UHD_LLAMA,
    UHD_OVERRIDES,
    YI_SENTENCEPIECE,
    llama3_tokenizer,
    uhd_state,
    write_sentencepiece,
    write_shards,
)

LEGACY = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}


def vicuna(folder: Path) -> int:
    (folder / "tokenizer_config.json").write_text(json.dumps(LEGACY | {"bos_token": "<s>", "eos_token": "</s>"}))
    return write_sentencepiece(folder)


def yi(folder: Path) -> int:
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return write_sentencepiece(folder, **YI_SENTENCEPIECE)


def llama3(folder: Path) -> int:
    tokenizer = llama3_tokenizer()
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def published(
    folder: Path, tokens: Callable[[Path], int], settings: dict[str, Any] | None = None, **changes: Any
) -> dict[str, torch.Tensor]:
    """Write a LLaVA-UHD folder without its weights; returns them. settings: of config.json."""
    folder.mkdir(exist_ok=True)
    values = UHD_LLAMA | UHD_CONFIG | {"vocab_size": tokens(folder)} | (settings or {}) | changes
    (folder / "config.json").write_text(json.dumps(values))
    dtype = getattr(torch, values.get("torch_dtype", "float32"))
    return {key: value.to(dtype) for key, value in uhd_state(values).items()}


def imported(folder: Path, output: Path, *options: str) -> Any:
    result = CliRunner().invoke(app, ["import", "llava-uhd", str(folder), "-o", str(output), *options, *UHD_OVERRIDES])
    assert result.exit_code == 0, result.output
    return load(output)


@torch.no_grad()
def same_logits(folder: Path, model: Any, processor: Any) -> None:
    """On 300 text tokens, and on one image whose tokens are given to the source's language model as vectors."""
    source = LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert source.dtype == model.dtype == model.lm_head.weight.dtype
    size = source.config.vocab_size
    ids = torch.randint(size, (1, 300), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits[..., :size], source(ids).logits, atol=1e-5, rtol=1e-5)

    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    picture = Image.effect_noise((224, 168), 90).convert("RGB")
    inputs = processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False).to(model.dtype)
    visual = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output[0]
    places = inputs["input_ids"][0] == processor.image_token_id
    embedded = source.get_input_embeddings()(inputs["input_ids"].where(~places, 0))
    embedded[0, places] = visual.to(embedded.dtype)
    expected = source(inputs_embeds=embedded).logits
    torch.testing.assert_close(model(**inputs).logits[..., :size], expected, atol=1e-5, rtol=1e-5)


ROTARY: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 500000.0},
    "theta_and_null": {"rope_theta": 5e6, "rope_scaling": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 128},
    "llama3": {
        "rope_theta": 500000.0, "max_position_embeddings": 1024,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "max_position_embeddings": 256,
    },
    "partial": {"partial_rotary_factor": 0.5},
    "longrope": {
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 256,
    },
    "today": {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(ROTARY))
def test_rotary_settings_of_any_age_are_kept(tmp_path: Path, kind: str) -> None:
    state = published(tmp_path / "source", llama3, ROTARY[kind])
    save_file(state, tmp_path / "source" / "model.safetensors")
    model, processor = imported(tmp_path / "source", tmp_path / "ours")
    same_logits(tmp_path / "source", model, processor)


@pytest.mark.parametrize("tokens", [vicuna, yi, llama3])
def test_shards_with_leftovers(tmp_path: Path, tokens: Callable[[Path], int]) -> None:
    source = tmp_path / "source"
    state = published(source, tokens)
    write_shards(source, state)
    leftover = {key: torch.full_like(value, 7) for key, value in state.items()}
    for name in ("model-00001-of-00002_old.safetensors", "model-00003-of-00003.safetensors", "model.safetensors"):
        save_file(leftover, source / name)
    model, processor = imported(source, tmp_path / "ours")
    end = {vicuna: "</s>", yi: "<|im_end|>", llama3: "<|eot_id|>"}[tokens]
    assert processor.tokenizer.convert_tokens_to_ids(end) in model.generation_config.eos_token_id
    (source / "model.safetensors").unlink()  # transformers would take it before the index
    same_logits(source, model, processor)


def test_pickles_are_read_only_when_asked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    state = published(source, vicuna)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    write_shards(source, state | tables, ".bin")
    (source / "training_args.bin").write_bytes(b"not weights")
    arguments = ["import", "llava-uhd", str(source), "-o", str(tmp_path / "ours"), *UHD_OVERRIDES]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError) and "--allow-bin" in str(result.exception)
    assert "pytorch_model-00001-of-00002.bin" in str(result.exception) and not (tmp_path / "ours").exists()
    model, processor = imported(source, tmp_path / "ours", "--allow-bin")
    same_logits(source, model, processor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_a_folder_is_kept_throughout(tmp_path: Path, dtype: str) -> None:
    source = tmp_path / "source"
    state = published(source, yi, {"torch_dtype": dtype})
    projector = {key: value for key, value in state.items() if "mm_projector" in key}
    save_file(state | {key: value.float() for key, value in projector.items()}, source / "model.safetensors")
    model, processor = imported(source, tmp_path / "ours")
    assert {value.dtype for value in load_file(tmp_path / "ours" / "model.safetensors").values()} == {model.dtype}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == dtype
    assert str(model.dtype) == f"torch.{dtype}"
    same_logits(source, model, processor)


def test_after_an_import_every_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = published(tmp_path / "source", yi, {"torch_dtype": "bfloat16", "rope_theta": 500000.0})
    write_shards(tmp_path / "source", state)
    imported(tmp_path / "source", tmp_path / "ours")
    Image.effect_noise((224, 168), 90).convert("RGB").save(tmp_path / "picture.png")
    turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "a cup"}]
    (tmp_path / "test.json").write_text(json.dumps([{"id": "1", "image": "picture.png", "conversations": turns}]))
    for command in (
        ["generate", "ours", "what is this?", "--image", "picture.png", "--max-new-tokens", "3"],
        ["eval", "ours", "test.json"],
        ["export", "ours", "-o", "exported"],
        ["verify", "exported"],
        ["generate", "exported", "what is this?", "--image", "picture.png", "--max-new-tokens", "3"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output, result.exception)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"


TEXTS = [
    "A chat between a curious user", " leading space", "  two  spaces ", "tabs\tand\nlines\n", "naïve café 東京 🙂 ½",
    "1999, 20 and 45", "don't", "", " ", "<|im_start|>user\nwhat", "▁ is the space itself",
]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "yi": YI_SENTENCEPIECE, "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "trimmed": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no_bytes": {"byte_fallback": False, "vocab_size": 150},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "renamed": {"bos_piece": "[B]", "eos_piece": "[E]", "unk_piece": "[U]"},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tokens_are_those_of_sentencepiece(tmp_path: Path, kind: str) -> None:
    write_sentencepiece(tmp_path, **KINDS[kind])
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    found = load_tokenizer(str(tmp_path), "<image>")
    found.save_pretrained(tmp_path / "saved")
    for tokenizer in (found, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert len(tokenizer) == reference.vocab_size() + 1 and tokenizer.image_token_id == reference.vocab_size()
        for text in TEXTS:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), text
            assert tokenizer(text)["input_ids"] == [reference.bos_id(), *reference.encode(text)]
        ids = reference.encode("What is written, 45?")
        assert tokenizer.decode(ids) == reference.decode(ids)
        pieces = ["a red cup", "\nwhat"]  # LLaVA's way: each piece by itself, around the image
        expected = [*reference.encode(pieces[0]), tokenizer.image_token_id, *reference.encode(pieces[1])]
        assert tokenizer("<image>".join(pieces), add_special_tokens=False)["input_ids"] == expected
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (reference.bos_id(), reference.eos_id())


def test_files_beside_tokenizer_model_are_read(tmp_path: Path) -> None:
    size = write_sentencepiece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size, "<im_patch>": size + 1}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>", "unk_token": "<unk>"}))
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    expected = [*reference.encode("a cup"), size + 1, *reference.encode("it")]
    load_tokenizer(str(tmp_path), "<image>").save_pretrained(tmp_path / "saved")
    for folder in (tmp_path, tmp_path / "saved"):
        found = load_tokenizer(str(folder), "<image>")
        assert (found.pad_token_id, found.image_token_id, found.unk_token_id) == (size, size + 2, 0)
        assert found("a cup<im_patch>it", add_special_tokens=False)["input_ids"] == expected
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size + 7}))
    with pytest.raises(ValueError, match=rf"the added token '<pad>' has the id {size + 7}, and the next free id is"):
        load_tokenizer(str(tmp_path), "<image>")


def test_after_a_special_token_no_space_is_put_unless_the_folder_is_legacy(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for legacy, second in ((True, "USER"), (False, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(LEGACY | {"legacy": legacy}))
        ids = load_tokenizer(str(tmp_path), "<image>")("cup</s>USER", add_special_tokens=False)["input_ids"]
        spaced = [*reference.encode("cup"), 2, *reference.encode("USER")]
        plain = [*reference.encode("cup"), 2, *(i for i in reference.encode("xUSER")[2:])]
        assert ids == (spaced if second else plain)


def test_a_tokenizer_model_that_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, user_defined_symbols=["<tool>"])  # and a space before every text
    with pytest.raises(ValueError, match=r"tokenizer\.model': the converted tokenizer makes .* add a tokenizer\.json"):
        load_tokenizer(str(tmp_path), "<image>")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's, as Meta publishes Llama 3's
    with pytest.raises(ValueError, match=r"tokenizer\.model' is not a SentencePiece model .*tokenizer\.json"):
        load_tokenizer(str(tmp_path), "<image>")


def refused(folder: Path, output: Path, *options: str) -> str:
    """What the command says about a folder that it refuses, leaving nothing at `output`."""
    result = CliRunner().invoke(app, ["import", "llava-uhd", str(folder), "-o", str(output), *options, *UHD_OVERRIDES])
    assert isinstance(result.exception, ValueError), (result.output, result.exception)
    assert not list(output.parent.glob(f"*{output.name}*"))
    return str(result.exception)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_that_cannot_be_obeyed_is_refused(tmp_path: Path, suffix: str) -> None:
    source, output = tmp_path / "source", tmp_path / "ours"
    first, second = write_shards(source, published(source, vicuna), suffix)
    index = next(source.glob("*.index.json"))
    good, options = index.read_text(), ["--allow-bin"]
    outside = tmp_path / first.name
    for name, cause in (
        (str(second.resolve()), "outside of the folder"),
        (f"../{first.name}", "outside of the folder"),
        (f"part/../../{first.name}", "outside of the folder"),
        (f"link{suffix}", "outside of the folder"),
        (f"missing{suffix}", f"index.json' lists 'missing{suffix}', which is not in its folder"),
        (".", "lists '.', which is not in its folder"),
    ):
        outside.write_bytes(first.read_bytes())
        (source / f"link{suffix}").unlink(missing_ok=True)
        (source / f"link{suffix}").symlink_to(outside)
        index.write_text(good.replace(f'"{second.name}"', json.dumps(name)))
        message = refused(source, output, *options)
        assert cause in message and str(index) in message, message
    for broken in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(broken)
        assert str(index) in refused(source, output, *options)
    promised = json.loads(good)
    promised["weight_map"]["model.norm.weight"] = first.name
    index.write_text(json.dumps(promised))
    message = refused(source, output, *options)
    assert f"{first.name}' lacks model.norm.weight, which the folder's index promises" in message
    index.write_text(good)
    second.write_bytes(second.read_bytes()[:1000])
    assert f"{second.name}' cannot be read" in refused(source, output, *options)
    second.unlink()
    assert f"lists '{second.name}', which is not in its folder" in refused(source, output, *options)


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_shards(source, published(source, vicuna))
    (source / "model.safetensors.index.json").unlink()
    message = refused(source, tmp_path / "ours")
    assert "holds 2 .safetensors files (model-00001-of-00002.safetensors" in message
    assert "no model.safetensors.index.json" in message


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    source = tmp_path / "models--a--b" / "snapshots" / "0123"
    source.mkdir(parents=True)
    blobs = source.parents[1] / "blobs"
    blobs.mkdir()
    for i, file in enumerate(write_shards(source, published(source, vicuna))):
        file.rename(blobs / str(i))
        file.symlink_to(Path("..", "..", "blobs", str(i)))
    model, processor = imported(source, tmp_path / "ours")
    same_logits(source, model, processor)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "'su'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_parameters"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"model_type": "llava_mistral"}, "model_type is 'llava_mistral'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_llama_does_not_have_are_refused(tmp_path: Path, changes: dict[str, Any], cause: str) -> None:
    source = tmp_path / "source"
    save_file(published(source, vicuna), source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    message = refused(source, tmp_path / "ours")
    assert cause in message and str(source / "config.json") in message, message


def test_settings_that_change_nothing_are_taken(tmp_path: Path) -> None:
    neutral = {"sliding_window": 4096, "use_sliding_window": False, "logit_scale": 1.0, "quantization_config": None}
    state = published(tmp_path / "source", vicuna, {**neutral, "pretraining_tp": 2, "rope_scaling": None})
    save_file(state, tmp_path / "source" / "model.safetensors")
    same_logits(tmp_path / "source", *imported(tmp_path / "source", tmp_path / "ours"))


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    source = tmp_path / "source"
    state = published(source, llama3, {"tie_word_embeddings": True})
    del state["lm_head.weight"]
    save_file(state, source / "model.safetensors")
    same_logits(source, *imported(source, tmp_path / "ours"))
