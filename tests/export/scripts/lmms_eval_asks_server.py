"""FOLDER ADDRESS: lmms-eval's `openai` model on a server that serves the folder, two requests. Prints JSON."""

import json
import sys

from lmms_eval.models import get_model
from lmms_eval_itself import DOCUMENTS, request

QUESTIONS = ("how many", "hello")  # with a picture, and without


def main(folder: str, address: str) -> None:
    cls = get_model("openai")
    lmm = cls(model_version=folder, base_url=f"{address}/v1", api_key="none", timeout=300, num_concurrent=1)
    lmm.task_dict = {"toy": {"test": list(DOCUMENTS)}}
    asked = [request(list(DOCUMENTS).index(question), question) for question in QUESTIONS]
    for item in asked:
        item.args[2]["temperature"] = 0
    answers = [getattr(answer, "text", answer) for answer in lmm.generate_until(asked)]
    print(json.dumps({"class": f"{cls.__module__}.{cls.__name__}", "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
