"""FOLDER: lmms-eval's own registry and loop with the plug-in of moe_vision, on three requests. Prints JSON."""

import json
import sys
from typing import Any

from folder import picture, prompt
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model

LENGTH = 6
DOCUMENTS: dict[str, list[Any]] = {"how many": [picture(0)], "which is larger": [picture(1), picture(2)], "hello": []}


def messages(question: str) -> list[dict[str, Any]]:
    """As a task's `doc_to_messages` gives them."""
    images = [{"type": "image", "url": image} for image in DOCUMENTS[question]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def request(number: int, question: str) -> Instance:
    asked = (question, messages, {"max_new_tokens": LENGTH, "until": ["\n"]}, number, "toy", "test")
    return Instance("generate_until", asked, number, {"task": "toy", "doc_id": number, "repeats": 1})


def main(folder: str) -> None:
    cls = get_model("moe_vision")
    lmm = cls.create_from_arg_string(f"pretrained={folder}", {"batch_size": 2, "device": "cpu"})
    lmm.task_dict = {"toy": {"test": list(DOCUMENTS)}}
    answers = lmm.generate_until([request(i, question) for i, question in enumerate(DOCUMENTS)])
    expected = []
    for question, images in DOCUMENTS.items():
        text = prompt(lmm.processor, question, len(images))
        inputs = lmm.processor(text=[text], images=images, return_tensors="pt")
        new = lmm.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected += lmm.processor.batch_decode(new, skip_special_tokens=True)
    print(json.dumps({
        "class": f"{cls.__module__}.{cls.__name__}", "bases": [base.__name__ for base in cls.__mro__[1:3]],
        "answers": [answer.text for answer in answers], "expected": expected,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
