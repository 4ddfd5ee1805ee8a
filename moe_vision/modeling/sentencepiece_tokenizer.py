"""A fast tokenizer from a folder that has only SentencePiece's `tokenizer.model`, with the same tokens.

tokenizer.model ─ backend() ─ tokenizers.Tokenizer ─ check() against SentencePiece ─ PreTrainedTokenizerFast

transformers' own conversion by class ignores `add_dummy_prefix` (Yi has none) and the space before a text that begins
with one. This one follows the model's own settings, and refuses a model whose tokens it cannot repeat.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_vision.modeling.model_files import find_file, read_object

SPACE = "▁"
UNIGRAM, BYTE_PAIRS = 1, 2
"""`trainer_spec.model_type` (sentencepiece_model.proto); words and characters are the others."""
CONTROL, USER_DEFINED = 3, 4
"""`piece.type` of tokens that text is split at."""
PROBES = (
    "A chat between a curious user and an artificial intelligence assistant.", "What is 3 + 4, in words?\nseven",
    "  two  spaces, then\ttabs \n\n  and lines  ", "naïve café, 東京, ﬁne ½ 🙂", "don't", "x", " x", "", " ",
)  # fmt: skip


def read_tokenizer(source: str, **settings: Any) -> Any:
    """The tokenizer of a folder or Hub id. settings: passed to `from_pretrained`.

    Raises OSError where there is none, ValueError for a `tokenizer.model` that cannot be converted exactly.
    """
    model = sentencepiece_file(source)
    if model is not None:
        return converted(model, **settings)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **settings)


def sentencepiece_file(source: str) -> Path | None:
    """`tokenizer.model` of a source that has no `tokenizer.json`, or None."""
    return None if find_file(source, "tokenizer.json") is not None else find_file(source, "tokenizer.model")


def converted(file: Path, **settings: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model, with the settings of the `tokenizer_config.json` beside it.

    Raises ValueError where it is no SentencePiece model, or where its tokens cannot be repeated.
    """
    proto, processor = sentencepiece_model(file)
    path = file.with_name("tokenizer_config.json")
    config = read_object(path) if path.is_file() else {}
    # `legacy` is true where a folder does not say, as in the library when these folders were published.
    tokenizer_object = backend(proto, every_part=bool(config.get("legacy", True)))
    check(tokenizer_object, processor, proto, file)
    add_tokens(tokenizer_object, file.parent, config)
    trained = proto.trainer_spec
    pieces = (("bos_token", trained.bos_id), ("eos_token", trained.eos_id), ("unk_token", trained.unk_id))
    named = {name: proto.pieces[i].piece for name, i in pieces if i >= 0 and not config.get(name)}
    settings.pop("config", None)  # of the model; it would choose a class
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(file.parent),
        **{"add_bos_token": config.get("add_bos_token", True), **named, **settings},
        tokenizer_object=tokenizer_object,
    )
    add_tokens(tokenizer.backend_tokenizer, file.parent, config)  # the library adds them too, as parts of a spaced text
    return tokenizer


def add_tokens(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Add the tokens that a folder declares beyond its model, in `added_tokens.json` or tokenizer_config.json.

    They are found in a text as it is written, before the space at its start is put. Raises ValueError where their ids
    are not the next free ones.
    """
    path = folder / "added_tokens.json"
    declared = {int(i): content for content, i in (read_object(path) if path.is_file() else {}).items()}
    plain = {i: AddedToken(str(content), normalized=False) for i, content in declared.items()}
    for number, value in config.get("added_tokens_decoder", {}).items():
        settings = {key: value[key] for key in ("lstrip", "rstrip", "single_word", "special") if key in value}
        plain[int(number)] = AddedToken(value["content"], normalized=False, **settings)
    for number, token in sorted(plain.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ValueError(
                f"'{folder}': the added token {token.content!r} has the id {number}, and the next free id is "
                f"{tokenizer.token_to_id(token.content)}: add a tokenizer.json to the folder"
            )


def sentencepiece_model(file: Path) -> tuple[Any, Any]:
    """The parsed file and SentencePiece's own processor. Raises ValueError where it is no such model."""
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(file.read_bytes())
        processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (DecodeError, RuntimeError) as error:
        raise ValueError(
            f"'{file}' is not a SentencePiece model ({error}): fetch it again, or add the folder's tokenizer.json"
        ) from error
    return proto, processor


def backend(proto: Any, every_part: bool) -> Tokenizer:
    """A tokenizer that follows a SentencePiece model's settings.

    every_part: put the leading space before every part between special tokens, or before the whole text alone.
    """
    pieces, rules = [(piece.piece, piece.score) for piece in proto.pieces], proto.normalizer_spec
    model: Any
    if proto.trainer_spec.model_type == BYTE_PAIRS:
        vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
        split_at = {piece.piece for piece in proto.pieces if piece.type in (CONTROL, USER_DEFINED)}
        model = BPE(
            vocab=vocabulary, merges=merges(vocabulary, dict(pieces), split_at), fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback, unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        )  # fmt: skip
    else:
        model = Unigram(pieces, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix and every_part:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if rules.add_dummy_prefix and not every_part:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    ends: list[Any] = [decoders.Strip(content=" ", left=1)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


def merges(vocabulary: dict[str, int], scores: dict[str, float], apart: set[str]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a third, the best score first: what byte-pair encoding applies in this order.

    apart: pieces that never merge.
    """
    ranked = []
    for piece, score in scores.items():
        if piece in apart or len(piece) < 2:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary and not apart & {left, right}:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def check(tokenizer: Tokenizer, processor: Any, proto: Any, file: Path) -> None:
    """Raises ValueError where a converted tokenizer's tokens of some texts are not SentencePiece's."""
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    # A space at the start is the one place where a leading space before the whole text alone shows.
    texts = PROBES if tokenizer.pre_tokenizer is None else tuple(text for text in PROBES if text.strip() == text)
    for text in (*texts, *(f"a {symbol} b" for symbol in symbols[:8])):
        ours, expected = tokenizer.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ours != expected:
            raise ValueError(
                f"'{file}': the converted tokenizer makes {ours} of {text!r}, and SentencePiece {expected}: add a "
                "tokenizer.json to the folder (save it with the tokenizer's own class)"
            )
