"""`--model moe_vision` of lmms-eval: a plug-in that evaluates a model folder or an export.

    lmms-eval --model moe_vision --model_args pretrained=FOLDER --tasks mme

The contract is lmms-eval 0.7's own: an entry point of the group `lmms_eval.models` gives a `ModelManifest`
(`lmms_eval/models/registry_v2.py`), which names a subclass of `lmms` for chat messages. Ours is a subclass of the
generic `Huggingface` (`lmms_eval/models/chat/huggingface.py`), which asks and batches but loads by `AutoModel`, without
a head. lmms-eval imports this module in the midst of its own import, and moe_vision does without lmms-eval: the class
is made on demand.
"""

from functools import cache
from typing import Any


def manifest() -> Any:
    """The `ModelManifest` that the entry point gives."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="moe_vision", chat_class_path=f"{__name__}.MoeVision")


def __getattr__(name: str) -> Any:
    if name != "MoeVision":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return chat_class()


class Templated:
    """A processor of prompts that the chat template wrote, special tokens and all: none are added."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, **inputs: Any) -> Any:
        return self.processor(**inputs, add_special_tokens=False)


@cache
def chat_class() -> type:
    """The class `MoeVision` of this module."""
    import torch
    from accelerate import Accelerator
    from lmms_eval.api.model import lmms
    from lmms_eval.models.chat.huggingface import Huggingface

    from moe_vision.modeling.compose import load

    class MoeVision(Huggingface):
        """pretrained: a model folder or an export. dtype: by default the saved one, else a name as `bfloat16`.

        device: by default the accelerator, if there is one; under `accelerate launch` each process has its own.
        """

        is_simple = False

        def __init__(
            self,
            pretrained: str,
            device: str | None = None,
            batch_size: int | str | None = 1,
            dtype: str | None = None,
            use_cache: bool = True,
            system_prompt: str | None = None,
        ) -> None:
            lmms.__init__(self)  # not Huggingface's own, which loads; below is what its generate_until reads
            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            alone = self._world_size == 1
            self._device = torch.device(device) if device and alone else self.accelerator.device
            self.device_map = str(self._device)
            loaded: Any = load(pretrained, getattr(torch, dtype) if dtype else None)
            self._model, processor = loaded
            self._model.to(self._device)
            self._config = self._model.config
            self._max_length = self._config.text_config.max_position_embeddings
            self.processor, self._tokenizer = Templated(processor), processor.tokenizer
            self.batch_size_per_gpu = int(batch_size or 1)
            self.use_cache = use_cache
            self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None

    return MoeVision
