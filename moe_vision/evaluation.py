"""Ask a model, and score its answers by exact match."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.utils import send_to_device
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moe_vision.data.chat import check_markers, check_texts, image_tokens, message, render
from moe_vision.data.faults import DataError, Fault, RecordFault, faults_of, problems_of
from moe_vision.data.records import IMAGE_MARKER, Record, Turn, load_image
from moe_vision.modeling import MoeVisionForConditionalGeneration, MoeVisionProcessor
from moe_vision.modeling.compose import load

Pictures = Callable[[Sequence[Path]], dict[str, Any]]
"""From paths of pictures to what stands for them: the model's inputs `pixel_values`, `mixed_tokens`, `feature_maps`."""


OnFault = Literal["fatal", "skip"]

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Greedy decoding, whatever the generation defaults of the language model."""


@dataclass(frozen=True)
class Prediction:
    """One answer and what it should have been."""

    id: str
    task: str
    answer: str
    prediction: str

    @property
    def right(self) -> bool:
        return self.answer.strip() == self.prediction.strip()


@dataclass(frozen=True)
class EvalReport:
    """Exact match by task, its plain average over tasks, and every prediction. skipped: records that were left out."""

    by_task: dict[str, float]
    average: float
    count: int
    predictions: list[Prediction]
    skipped: tuple[Fault, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def warnings(self) -> list[str]:
        """Results that point to a fault rather than to a weak model, each with a hint."""
        found = []
        if not any(prediction.prediction.strip() for prediction in self.predictions) and self.average < 1:
            found.append(
                f"all {self.count} answers are empty: the model generates its end token first. Check that training "
                "lowered the loss (curves/ of its output), on answers that are not empty, with this chat template"
            )
        elif not any(self.by_task.values()):
            first = self.predictions[0]
            found.append(
                f"every task scores 0: no answer equals the expected one, as in record {first.id!r}, where "
                f"{shortened(first.answer)} is expected and the answer is {shortened(first.prediction)}. Exact match "
                "needs answers worded as in training, and --max-new-tokens that they fit in"
            )
        return found


def shortened(text: str) -> str:
    """A text in quotes, of at most 60 characters."""
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def accelerator() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_on_accelerator(folder: Path) -> tuple[MoeVisionForConditionalGeneration, MoeVisionProcessor]:
    """`load`, with the model on the accelerator if there is one."""
    model, processor = load(folder)
    return cast(Any, model).to(accelerator()), processor


@torch.inference_mode()
def evaluate(
    model: MoeVisionForConditionalGeneration,
    processor: MoeVisionProcessor,
    records: Sequence[Record],
    batch_size: int = 64,
    max_new_tokens: int = 16,
    pictures: Pictures | None = None,
    on_fault: OnFault = "fatal",
) -> EvalReport:
    """Answer the last question of every record, greedily, in left-padded batches, and score by exact match.

    pictures: what experts made of the pictures before, where they are not sliced; they are decoded if None. on_fault:
    whether a question that does not fit in the context, or an image that the slicing refuses, ends the evaluation
    before it begins, or is left out. Raises ValueError if there is no record, DataError naming all faults.
    """
    if not records:
        raise ValueError("there is no record to evaluate: give at least one")
    model.eval()
    records, skipped = fitting(model, processor, records, max_new_tokens)
    if skipped and (on_fault == "fatal" or not records):
        raise DataError("the questions", problems_of(skipped))
    predictions = []
    for start in range(0, len(records), batch_size):
        chunk = records[start : start + batch_size]
        answers = generate(model, processor, [(r.turns[:-1], r.images) for r in chunk], max_new_tokens, known=pictures)
        for record, answer_ in zip(chunk, answers, strict=True):
            predictions.append(Prediction(record.id, record.task, record.turns[-1].text, answer_))
    grouped: dict[str, list[bool]] = defaultdict(list)
    for prediction in predictions:
        grouped[prediction.task].append(prediction.right)
    by_task = {task: sum(right) / len(right) for task, right in grouped.items()}
    return EvalReport(by_task, sum(by_task.values()) / len(by_task), len(predictions), predictions, tuple(skipped))


def fitting(
    model: MoeVisionForConditionalGeneration,
    processor: MoeVisionProcessor,
    records: Sequence[Record],
    max_new_tokens: int,
) -> tuple[list[Record], list[Fault]]:
    """Records whose last question can be answered, and the faults of the others."""
    context = context_of(model)
    fit, faults = [], []
    for record in records:
        try:
            with faults_of(record.id):
                prompt = prompt_text(processor, record.turns[:-1], record.images)
                tokens = len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            check_context(tokens, max_new_tokens, context, f"record {record.id!r}: the question")
        except RecordFault as error:
            faults.append(Fault(record.id, error.reason, str(error)))
        else:
            fit.append(record)
    return fit, faults


def context_of(model: MoeVisionForConditionalGeneration) -> int | None:
    """Positions that the language model was made for; None if it has no limit."""
    return getattr(model.config.text_config, "max_position_embeddings", None)


def check_context(tokens: int, max_new_tokens: int, context: int | None, what: str) -> None:
    """Raise RecordFault if a prompt of so many tokens and an answer do not fit in the context together."""
    if context is not None and tokens + max_new_tokens > context:
        raise RecordFault(
            f"{what} has {tokens} tokens with those of its images, which with {max_new_tokens} of the answer are more "
            f"than the language model's context of {context}: shorten it, give fewer images, or lower max_new_tokens",
            "too_long",
        )


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (null of a single value) and the values in the order of the seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "values": list(values)}


def generate(
    model: MoeVisionForConditionalGeneration,
    processor: MoeVisionProcessor,
    prompts: Sequence[tuple[Sequence[Turn], Sequence[Path]]],
    max_new_tokens: int,
    min_new_tokens: int | None = None,
    known: Pictures | None = None,
) -> list[str]:
    """Greedy answers to conversations with their pictures. Each distinct picture of the batch is encoded once.

    known: as `pictures` of `evaluate`. Raises RecordFault if a prompt and its answer do not fit in the context.
    """
    pictures = [(path, len(images)) for _, images in prompts for path in images]
    inputs = processor.tokenizer(
        [prompt_text(processor, turns, images) for turns, images in prompts],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_token_type_ids=False,
        return_tensors="pt",
    ).to(model.device)
    for tokens in inputs["attention_mask"].sum(1).tolist():
        check_context(tokens, max_new_tokens, context_of(model), "the question")
    encoded: dict[str, Any] = {}
    if pictures:
        encoded["mm_encoder_outputs"] = {"image": encode(model, processor, pictures, known)}
    lengths = answer_lengths(model.generation_config, inputs["input_ids"].shape[1], max_new_tokens, min_new_tokens)
    settings: Any = GREEDY | lengths
    output: Any = model.generate(**inputs, **encoded, **settings)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_lengths(
    defaults: GenerationConfig, prompt: int, max_new_tokens: int, min_new_tokens: int | None
) -> dict[str, int]:
    """Arguments of `generate` for answers of these lengths in tokens. transformers warns in each call where
    `max_new_tokens` meets a default `max_length`, which counts the prompt too: then that one is given."""
    lengths = {}
    for name, tokens in (("max", max_new_tokens), ("min", min_new_tokens)):
        if tokens is not None and getattr(defaults, f"{name}_length") is None:
            lengths[f"{name}_new_tokens"] = tokens
        elif tokens is not None:
            lengths[f"{name}_length"] = prompt + tokens
    return lengths


def prompt_text(processor: MoeVisionProcessor, turns: Sequence[Turn], images: Sequence[Path]) -> str:
    """A conversation as the tokenizer takes it, with the placeholders of its images, up to where the answer begins."""
    text = render(processor, [message(turn) for turn in turns], generation=True)
    check_texts(turns, "the question", processor)
    check_markers(text, len(images), "the question", processor)
    return with_placeholders(text, images, processor)


def with_placeholders(text: str, images: Sequence[Path], processor: MoeVisionProcessor) -> str:
    """A prompt with as many placeholders for each of its image markers as the image has tokens."""
    first, *rest = text.split(processor.image_token)
    counts = image_tokens(images, processor)
    return first + "".join(processor.image_token * n + part for n, part in zip(counts, rest, strict=True))


def encode(
    model: MoeVisionForConditionalGeneration, processor: MoeVisionProcessor, pictures: Sequence[tuple[Path, int]],
    known: Pictures | None = None,
) -> BaseModelOutputWithPooling:  # fmt: skip
    """Tokens [N, D] for every picture (its path, and how many its prompt has) in order, as `pooler_output`; each
    distinct one is encoded once."""
    distinct = list(dict.fromkeys(pictures))
    if known is None:
        images = [load_image(path) for path, _ in distinct]
        made = processor.image_processor(images, images_per_prompt=[n for _, n in distinct], return_tensors="pt").data
    else:
        made = known([path for path, _ in distinct])
    encoded: Any = model.get_image_features(**send_to_device(made, model.device), return_dict=True)
    rows = [distinct.index(picture) for picture in pictures]
    output = BaseModelOutputWithPooling()
    for key in ("pooler_output", "local", "places"):  # the latter two where a selector needs them
        if encoded.get(key) is not None:
            output[key] = [encoded[key][row] for row in rows]
    return output


@torch.inference_mode()
def answer(
    model: MoeVisionForConditionalGeneration,
    processor: MoeVisionProcessor,
    question: str,
    images: Sequence[Path] = (),
    max_new_tokens: int = 64,
) -> str:
    """Answer one question about pictures on disk; markers are put before a question that has none.

    Raises ValueError if the question has markers, but not one for each picture.
    """
    markers = question.count(IMAGE_MARKER)
    if markers == 0:
        question = IMAGE_MARKER * len(images) + question
    elif markers != len(images):
        raise ValueError(
            f"the question has {markers} {IMAGE_MARKER} markers for {len(images)} images: give one for each"
        )
    return generate(model, processor, [([Turn("user", question)], images)], max_new_tokens)[0].strip()
