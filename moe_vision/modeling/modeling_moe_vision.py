"""The fused model: experts → mixer → adapter → language model, as a transformers model.

pixel_values [V, 3, H, W] ─ VisionTower ─ VisualTokens [V, N, C] ─ adapter ─ [V, N, D] ─ pack, in the plan's order ─┐
input_ids [B, T] ─ embeddings [B, T, D] ─ every placeholder replaced by its visual token ────────────────────────────┴─
language model ─ loss
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput

from moe_vision.fusion.base import Mixer
from moe_vision.modeling.configuration_moe_vision import MoeVisionConfig, MoeVisionVisionConfig
from moe_vision.slicing.pack import pack
from moe_vision.slicing.plan import Size
from moe_vision.types import FeatureMap, VisualTokens


@dataclass
class MoeVisionModelOutput(BaseModelOutputWithPast):
    """last_hidden_state: [B, T, D]; image_hidden_states: all images' tokens [count, D], if there were images."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class MoeVisionCausalLMOutput(ModelOutput):
    """loss: scalar; logits: [B, T, vocabulary]; the rest as the language model gives it."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class MoeVisionPreTrainedModel(PreTrainedModel):
    config_class = MoeVisionConfig
    config: MoeVisionConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoeVisionTower"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Experts and the language model draw their own weights when they are built; this runs again for the whole
        # only on what `from_pretrained` did not find, and for buffers that no checkpoint holds.
        super()._init_weights(module)
        draw: Any = getattr(module, "init_non_persistent_buffers", None)
        if draw is not None:
            draw()


class MoeVisionTower(nn.Module):
    """The experts of a branch on views of one size, then its mixer."""

    def __init__(self, config: MoeVisionVisionConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({name: expert.build() for name, expert in config.expert_configs().items()})
        self.mixers = nn.ModuleDict(
            {branch: config.mixer(branch).build(config.map_shapes(branch)) for branch in config.branches}
        )
        self.branch_experts = {branch: config.branch_experts(branch) for branch in config.branches}

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating parameter: quantised language models leave the tower's as it was."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        branch: str = "overview",
        feature_maps: Mapping[str, torch.Tensor] | None = None,
    ) -> VisualTokens:
        """Views [V, 3, H, W] in [0, 1] → VisualTokens [V, N, C]. feature_maps: as `mix` takes them."""
        mixer: Any = self.mixers[branch]
        views = None if pixel_values is None else pixel_values.to(self.dtype)
        return mix({name: self.experts[name] for name in self.branch_experts[branch]}, mixer, views, feature_maps)


def mix(
    experts: Mapping[str, nn.Module],
    mixer: Mixer,
    views: torch.Tensor | None,
    feature_maps: Mapping[str, torch.Tensor] | None = None,
) -> VisualTokens:
    """Views [V, 3, H, W] → VisualTokens [V, N, C]; an expert between whose blocks others speak runs last.

    feature_maps: what experts made of the views before, [V, C, h, w] by name; those do not run. Raises ValueError where
    an expert has to run and there are no views, or where others speak between the blocks of one that has a map.
    """
    known = feature_maps or {}
    running = [name for name in experts if name not in known]
    if mixer.injected in known:
        raise ValueError(f"feature_maps has '{mixer.injected}', between whose blocks the others speak: give it pixels")
    if unknown := [name for name in known if name not in experts]:
        raise ValueError(f"feature_maps has {unknown}, which are no experts of this branch ({', '.join(experts)})")
    if running and views is None:
        raise ValueError(f"experts {running} have no map in feature_maps: give pixel_values too")
    maps = {
        name: FeatureMap(known[name]) if name in known else expert(views)
        for name, expert in experts.items()
        if name != mixer.injected
    }
    if mixer.injected is not None:
        maps[mixer.injected] = experts[mixer.injected](views, mixer.injection(maps))
    return mixer(maps)


class MoeVisionModel(MoeVisionPreTrainedModel):
    """Vision tower, adapters and language model, without the language modelling head."""

    def __init__(self, config: MoeVisionConfig) -> None:
        super().__init__(config)
        vision, width = config.vision_config, config.text_config.hidden_size
        self.vision_tower = MoeVisionTower(vision)
        self.multi_modal_projector = nn.ModuleDict(
            {branch: vision.adapter(branch).build(vision.mixed_shape(branch), width) for branch in vision.branches}
        )
        self.mixed_grid = vision.mixed_shape("overview").grid
        self.policy = vision.policy()
        learnt = self.policy.learnt_markers()
        self.markers = nn.ParameterDict({name: nn.Parameter(torch.randn(width) * width**-0.5) for name in learnt})
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        mixed_tokens: torch.Tensor | None = None,
        return_dict: bool | None = None,
        feature_maps: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode views [V, 3, H, W]; `pooler_output` is a list with one tensor [tokens, D] per image.

        image_sizes: [images, 3] height, width and images in the prompt, as the processor gives them; where there is no
        slicing they may be left out. mixed_tokens: [V, N, C], what the vision tower made of the views before, in their
        place, where there is no slicing. feature_maps: likewise what experts made of them, as `mix` takes them.
        """
        output = BaseModelOutputWithPooling()
        if not self.policy.one_view:
            if pixel_values is None or image_sizes is None or feature_maps is not None:
                raise ValueError(
                    f"slicing '{self.policy.type_name}' needs pixel_values and image_sizes: give both, as this model's "
                    "processor makes them, and nothing in their place"
                )
            output["pooler_output"] = self.encode_sliced(pixel_values, image_sizes)
        else:
            if mixed_tokens is None:
                mixed = self.vision_tower(pixel_values, feature_maps=feature_maps)
            else:
                mixed = VisualTokens(mixed_tokens, self.mixed_grid)
            output["last_hidden_state"] = mixed.data
            output["pooler_output"] = list(self.multi_modal_projector["overview"](mixed).data)
        return output.to_tuple() if return_dict is False else output

    def encode_sliced(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> list[torch.Tensor]:
        """Tokens [tokens, D] of each image, from all images' views [V, 3, H, W] in their plans' order.

        Views of one size are encoded together, whichever images they are of.
        """
        plans = [self.policy.plan((height, width), images) for height, width, images in image_sizes.tolist()]
        views = [view for plan in plans for view in plan.views]
        if len(views) != pixel_values.shape[0]:
            raise ValueError(
                f"images of sizes {image_sizes.tolist()} have {len(views)} views, pixel_values holds "
                f"{pixel_values.shape[0]}: make both with this model's processor"
            )
        buckets: dict[tuple[str, Size], list[int]] = defaultdict(list)
        for row, view in enumerate(views):
            buckets[self.config.vision_config.branch_of(view.role), view.size].append(row)
        encoded: dict[int, torch.Tensor] = {}
        for (branch, (height, width)), rows in buckets.items():
            mixed = self.vision_tower(pixel_values[rows, :, :height, :width], branch)
            encoded |= zip(rows, self.multi_modal_projector[branch](mixed).data, strict=True)
        markers = self.marker_embeddings()
        packed, start = [], 0
        for plan in plans:
            end = start + len(plan.views)
            packed.append(pack(plan, [encoded[row] for row in range(start, end)], markers))
            start = end
        return packed

    def marker_embeddings(self) -> dict[str, torch.Tensor]:
        """Embedding [D] of each marker: of its token, or its own where it has none."""
        embeddings = dict(self.markers.items())
        if ids := self.config.vision_config.marker_ids:
            table: Any = self.get_input_embeddings()
            rows = table(torch.tensor(list(ids.values()), device=table.weight.device))
            embeddings |= zip(ids, rows, strict=True)
        return embeddings

    def splice(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, visual_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Put visual tokens [count, D] on the placeholders of embeddings [B, T, D], in order.

        Raises ValueError if there are not exactly as many placeholders as visual tokens.
        """
        if input_ids is None:
            token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        if not torch.compiler.is_compiling():
            check_placeholders(int(mask.sum()), visual_tokens.shape[0], self.config.image_token_id)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), visual_tokens.to(inputs_embeds))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mixed_tokens: torch.Tensor | None = None,
        feature_maps: dict[str, torch.Tensor] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | MoeVisionModelOutput:
        """input_ids [B, T] or inputs_embeds [B, T, D]; pixel_values [V, 3, H, W], the views of the batch's images in
        order; image_sizes [images, 3], which slicing needs.

        In place of pixel_values: mixed_tokens [V, N, C], as the vision tower gives them, or mm_encoder_outputs, or
        feature_maps, [V, C, h, w] by expert; experts that have none there run on pixel_values beside them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        views = pixel_values if feature_maps is None else feature_maps  # these stand for views, with or without pixels
        if sum(given is not None for given in (views, mixed_tokens, mm_encoder_outputs)) > 1:
            raise ValueError("give one of pixel_values (or feature_maps), mixed_tokens and mm_encoder_outputs")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded: Any = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None or mixed_tokens is not None or feature_maps is not None:
            encoded = self.get_image_features(
                pixel_values, image_sizes, mixed_tokens, return_dict=True, feature_maps=feature_maps
            )
        visual_tokens = None
        if encoded is not None:
            visual_tokens = torch.cat(tuple(encoded.pooler_output), dim=0)
            inputs_embeds = self.splice(input_ids, inputs_embeds, visual_tokens)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        result = MoeVisionModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=visual_tokens,
        )
        return result.to_tuple() if return_dict is False else result


def check_placeholders(placeholders: int, tokens: int, image_token_id: int) -> None:
    """Raise ValueError unless the text has exactly one placeholder for each token of its images."""
    if placeholders != tokens:
        raise ValueError(
            f"the text has {placeholders} image placeholders (token {image_token_id}), the images give {tokens} "
            "tokens: make both with this model's processor, and do not truncate through an image"
        )


class MoeVisionForConditionalGeneration(MoeVisionPreTrainedModel, GenerationMixin):
    """The fused model with its language modelling head: trains with `labels`, generates with `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MoeVisionConfig) -> None:
        super().__init__(config)
        self.model = MoeVisionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(self, *args: Any, **kwargs: Any) -> tuple | BaseModelOutputWithPooling:
        """As `MoeVisionModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mixed_tokens: torch.Tensor | None = None,
        feature_maps: dict[str, torch.Tensor] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | MoeVisionCausalLMOutput:
        """As `MoeVisionModel.forward`; labels [B, T] hold -100 where nothing is to be learnt."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            mixed_tokens=mixed_tokens,
            feature_maps=feature_maps,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        result = MoeVisionCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
        return result.to_tuple() if return_dict is False else result

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """As `GenerationMixin` does it, with every image encoded once, however many beams or samples there are."""
        views, sizes = model_kwargs.pop("pixel_values", None), model_kwargs.pop("image_sizes", None)
        if views is not None and expand_size > 1 and input_ids is not None:
            encoded: Any = self.get_image_features(views, sizes, return_dict=True)
            counts = (input_ids == self.config.image_token_id).sum(1).tolist()
            tokens = torch.cat(tuple(encoded.pooler_output))
            check_placeholders(sum(counts), tokens.shape[0], self.config.image_token_id)
            by_row = tokens.split(counts)
            repeated = BaseModelOutputWithPooling()
            repeated["pooler_output"] = [row for row in by_row for _ in range(expand_size)]
            model_kwargs["mm_encoder_outputs"] = {"image": repeated}
        elif views is not None:
            model_kwargs |= {"pixel_values": views, "image_sizes": sizes}
        mixin: Any = super()
        return mixin._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
