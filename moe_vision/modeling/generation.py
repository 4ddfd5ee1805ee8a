"""Generation from prompts with images: each is encoded once, and dropped tokens leave before the first step."""

from typing import Any

import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moe_vision.modeling.placeholders import check_placeholders, with_kept, without_dropped


class MoeVisionGenerationMixin(GenerationMixin):
    """What `generate` does for a model with `get_image_features` and, in `model`, a selector that may be null."""

    config: Any
    model: Any
    get_image_features: Any
    get_input_embeddings: Any

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `GenerationMixin.generate`. Tokens that a selector drops leave the sequence before the first step, so that
        they take neither time nor cache; what is returned holds the prompt as it was given.
        """
        mixin: Any = super()
        ids = kwargs.get("input_ids") if inputs is None else inputs
        given = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        views, sizes = kwargs.get("pixel_values"), kwargs.get("image_sizes")
        if self.model.selector is None or ids is None or (given is None and views is None):
            return mixin.generate(inputs, **kwargs)
        encoded: Any = self.get_image_features(views, sizes, return_dict=True) if given is None else given
        mask = kwargs.get("attention_mask")
        tokens, keep = self.model.select(encoded, ids, self.get_input_embeddings()(ids), mask)
        valid = with_kept(ids == self.config.image_token_id, keep)
        config = kwargs.get("generation_config") or self.generation_config
        pad = next((value for value in (kwargs.get("pad_token_id"), config.pad_token_id) if value is not None), 0)
        short, short_mask = without_dropped(ids, mask, valid, pad)
        for name in ("max_length", "min_length"):  # which count the prompt
            length = kwargs.get(name, getattr(config, name, None))
            if length is not None:
                kwargs[name] = length - ids.shape[1] + short.shape[1]
        replaced = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "mm_encoder_outputs")
        kwargs = {name: value for name, value in kwargs.items() if name not in replaced}
        kept = BaseModelOutputWithPooling()
        kept["pooler_output"] = [image[chosen] for image, chosen in zip(tokens, keep, strict=True)]
        kept["selected"] = True
        output = mixin.generate(
            input_ids=short, attention_mask=short_mask, mm_encoder_outputs={"image": kept}, **kwargs
        )
        sequences = output if torch.is_tensor(output) else output.sequences
        prompts = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
        restored = torch.cat([prompts, sequences[:, short.shape[1] :]], dim=1)
        if torch.is_tensor(output):
            return restored
        output.sequences = restored
        return output

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """As `GenerationMixin` does it, with every image encoded once, however many beams or samples there are."""
        views, sizes = model_kwargs.pop("pixel_values", None), model_kwargs.pop("image_sizes", None)
        encoded: Any = (model_kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        if views is not None and expand_size > 1 and input_ids is not None:
            encoded, views = self.get_image_features(views, sizes, return_dict=True), None
        if encoded is not None and expand_size > 1 and input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(1).tolist()
            tokens = torch.cat(tuple(encoded.pooler_output))
            check_placeholders(sum(counts), tokens.shape[0], self.config.image_token_id)
            by_row = tokens.split(counts)
            repeated = BaseModelOutputWithPooling()
            repeated["pooler_output"] = [row for row in by_row for _ in range(expand_size)]
            if encoded.get("selected"):
                repeated["selected"] = True
            encoded = repeated
        mixin: Any = super()
        input_ids, model_kwargs = mixin._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        # Behind the library, which would repeat images again, and in 5.16 knows none that are encoded.
        if views is not None:
            model_kwargs |= {"pixel_values": views, "image_sizes": sizes}
        if encoded is not None:
            model_kwargs["mm_encoder_outputs"] = {"image": encoded}
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As `GenerationMixin` does it, and images that the cache holds are not given again, as 5.16 would."""
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("mm_encoder_outputs", None)
        mixin: Any = super()
        updated: dict[str, Any] = mixin._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return updated
