"""The fused model: experts → mixer → adapter → language model, as a transformers model.

pixel_values [V, 3, H, W] ─ VisionTower ─ VisualTokens [V, N, C] ─ adapter ─ [V, N, D] ─ pack, in the plan's order ─┐
input_ids [B, T] ─ embeddings [B, T, D] ─ every placeholder replaced by its visual token ────────────────────────────┴─
language model ─ loss
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput

from moe_vision.modeling.configuration_moe_vision import MoeVisionConfig
from moe_vision.modeling.generation import MoeVisionGenerationMixin
from moe_vision.modeling.placeholders import check_placeholders, hidden_from, with_kept
from moe_vision.modeling.tower import MoeVisionTower
from moe_vision.modeling.turns import question_mask
from moe_vision.modeling.untouched import is_sharded, with_zero_gradients
from moe_vision.slicing.pack import pack, places
from moe_vision.slicing.plan import Plan, Size
from moe_vision.types import VisualTokens


@dataclass
class MoeVisionModelOutput(BaseModelOutputWithPast):
    """last_hidden_state: [B, T, D]; image_hidden_states: all images' tokens [count, D], if there were images;
    attention_mask as in `MoeVisionCausalLMOutput`.
    """

    image_hidden_states: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


@dataclass
class MoeVisionCausalLMOutput(ModelOutput):
    """loss: scalar; logits: [B, T, vocabulary]; the rest as the language model gives it.

    attention_mask: [B, T] without the tokens that a selector dropped, if there is one: for who goes on from the cache.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


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

    @classmethod
    def from_pretrained(cls, *args: Any, use_safetensors: bool | None = True, **kwargs: Any) -> Any:
        """As transformers' own, but pickled weights are read only where `use_safetensors` is false or None, and the
        logits do not depend on how files were cut.
        """
        library: Any = super()
        loaded = library.from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)
        align(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As transformers' own, in the language model. Experts keep what they were built with, as they do on loading:
        none of them knows every implementation.
        """
        wanted: Any = attn_implementation
        if isinstance(wanted, dict):
            wanted = wanted.get("text_config", wanted.get("", self.config._attn_implementation))
        base: Any = self.base_model
        base.language_model.set_attn_implementation(wanted, *args, **kwargs)
        self.config._attn_implementation = base.language_model.config._attn_implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Experts and the language model draw their own weights when they are built; this runs again for the whole
        # only on what `from_pretrained` did not find, and for buffers that no checkpoint holds.
        super()._init_weights(module)
        draw: Any = getattr(module, "init_non_persistent_buffers", None)
        if draw is not None:
            draw()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        # Behind the library, which draws every linear layer alike and overlooks modules without their own parameters.
        for module in self.modules():
            draw: Any = getattr(module, "draw_weights", None)
            if draw is not None:
                draw()


ALIGNMENT_BYTES = 64
"""Where torch lets a tensor's memory begin."""


def align(module: nn.Module) -> None:
    """Copy what lies in a file's pages to where torch would put it: CPU kernels round by where a weight begins, and in
    a file the names before it decide that.
    """
    for value in (*module.parameters(), *module.buffers()):
        plain = type(value.data) is torch.Tensor and value.device.type == "cpu"
        if plain and value.data_ptr() % ALIGNMENT_BYTES:
            value.data = value.data.clone()


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
        self.projected_by = {branch: vision.adapter(branch).projected_by for branch in vision.branches}
        self.policy = vision.policy()
        selector = vision.selector_config()
        self.reads = "none" if selector is None else selector.reads
        self.turns = vision.turn_ids()
        self.selector = None if selector is None else selector.build(width)
        if self.selector is not None and config.text_config._attn_implementation in ("vllm", "vllm_mla"):
            raise ValueError(
                "vLLM gives the language model every visual token and never asks a selector, so this model would "
                "answer as another one: use transformers, or compose without `branches.selector`"
            )
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

        Where there is a selector, `local` is a list with one [tokens] per image, true for the tokens of slices, among
        which it chooses, and `places` one with [tokens, 2], where in the image each lies, down and across, in 0..1.
        `gates` holds what each adapter of a mixture contributed, [V, N, adapters] by branch, where there is a mixture.

        image_sizes: [V, 3] of each view's image height, width and images in the prompt, as the processor gives them;
        where there is no slicing they may be left out. mixed_tokens: [V, N, C], what the vision tower made of the views
        before, in their place, where all views become as many. feature_maps: likewise what experts made of them, as
        `mix` takes them, where there is no slicing.
        """
        output = BaseModelOutputWithPooling()
        if not self.policy.one_view:
            views = pixel_values if mixed_tokens is None else mixed_tokens
            if views is None or image_sizes is None or feature_maps is not None:
                raise ValueError(
                    f"slicing '{self.policy.type_name}' needs pixel_values and image_sizes: give both, as this model's "
                    "processor makes them, and nothing in their place"
                )
            output |= self.encode_sliced(views, image_sizes)
        else:
            if mixed_tokens is None:
                mixed = self.vision_tower(pixel_values, feature_maps=feature_maps)
            else:
                mixed = VisualTokens(mixed_tokens, self.mixed_grid)
            adapted = self.adapt("overview", mixed)
            output["last_hidden_state"] = mixed.data
            output["pooler_output"] = list(adapted.data)
            if adapted.gates is not None:
                output["gates"] = {"overview": adapted.gates}
        return output.to_tuple() if return_dict is False else output

    def adapt(self, branch: str, mixed: VisualTokens) -> VisualTokens:
        """Mixed tokens [V, N, C] of a branch → [V, N', D]: its adapter, and another's projector where it has none."""
        adapted: VisualTokens = self.multi_modal_projector[branch](mixed)
        other = self.projected_by[branch]
        if other is None:
            return adapted
        adapter: Any = self.multi_modal_projector[other]
        projected: VisualTokens = adapter.projection(adapted)
        return projected

    def encode_sliced(self, inputs: torch.Tensor, image_sizes: torch.Tensor) -> dict[str, Any]:
        """`pooler_output`, `local` and `gates` of images, from all their views [V, 3, H, W] in their plans' order, or
        what the vision tower made of each, [V, N, C].

        Views of one size are encoded together, whichever images they are of.
        """
        plans = self.plans(image_sizes)
        views = [view for plan in plans for view in plan.views]
        if not len(views) == len(image_sizes) == inputs.shape[0]:
            raise ValueError(
                f"images of sizes {[plan.size for plan in plans]} have {len(views)} views, image_sizes holds "
                f"{len(image_sizes)} and pixel_values {inputs.shape[0]}: make both with this model's processor"
            )
        buckets: dict[tuple[str, Size], list[int]] = defaultdict(list)
        for row, view in enumerate(views):
            buckets[self.config.vision_config.branch_of(view.role), view.size].append(row)
        encoded: dict[int, torch.Tensor] = {}
        gates: dict[str, list[torch.Tensor]] = defaultdict(list)
        for (branch, size), rows in buckets.items():
            adapted = self.adapt(branch, self.mixed(inputs[rows], branch, size))
            encoded |= zip(rows, adapted.data, strict=True)
            if adapted.gates is not None:
                gates[branch].append(adapted.gates)
        markers = self.marker_embeddings()
        packed, start = [], 0
        for plan in plans:
            end = start + len(plan.views)
            packed.append(pack(plan, [encoded[row] for row in range(start, end)], markers))
            start = end
        found: dict[str, Any] = {"pooler_output": packed}
        if self.selector is not None:
            found["local"] = [torch.tensor(plan.local_tokens, device=inputs.device) for plan in plans]
            found["places"] = [places(plan).to(inputs.device) for plan in plans]
        return found | ({"gates": {name: torch.cat(parts) for name, parts in gates.items()}} if gates else {})

    def plans(self, image_sizes: torch.Tensor) -> list[Plan]:
        """The plan of every image, from what `image_sizes` [V, 3] says of each view's."""
        plans, rows = [], image_sizes.tolist()
        while rows:
            height, width, images = rows[0]
            plans.append(self.policy.plan((height, width), images))
            rows = rows[len(plans[-1].views) :]
        return plans

    def mixed(self, inputs: torch.Tensor, branch: str, size: Size) -> VisualTokens:
        """Views of `size` in a canvas [V, 3, H, W], or what the tower made of them before [V, N, C] → [V, N, C]."""
        if inputs.ndim == 3:
            return VisualTokens(inputs, self.config.vision_config.mixed_shape(branch, size).grid)
        tokens: VisualTokens = self.vision_tower(inputs[:, :, : size[0], : size[1]], branch)
        return tokens

    def select(
        self,
        encoded: Any,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What `get_image_features` gave, and the prompt's embeddings [B, T, D] → each image's tokens [tokens, D], and
        which of them the language model gets [tokens].

        Raises ValueError where the selector reads a question and there is none.
        """
        tokens = list(encoded.pooler_output)
        keep = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in tokens]
        if self.selector is None or encoded.get("selected"):
            return tokens, keep
        if encoded.get("local") is None:
            raise ValueError("mm_encoder_outputs does not say which tokens are of slices: take get_image_features' own")
        placeholders = self.placeholders(input_ids, inputs_embeds)
        rows = placeholders.nonzero()[:, 0].tolist()
        check_placeholders(len(rows), sum(map(len, tokens)), self.config.image_token_id)
        texts = self.texts(input_ids, placeholders, attention_mask)
        start = 0
        for i, (image, of_slices, where) in enumerate(zip(tokens, encoded["local"], encoded["places"], strict=True)):
            row, start = rows[start], start + len(image)
            if not of_slices.any():
                continue
            text = inputs_embeds[row][texts[row]]
            if self.reads != "none" and not len(text):
                raise ValueError(
                    f"prompt {row} of the batch has no text that its selector could read (text: {self.reads}): ask a "
                    "question, or take another selector"
                )
            selection = self.selector(image[of_slices], text, where[of_slices])
            tokens[i] = image.masked_scatter(of_slices[:, None], selection.tokens.to(image))
            keep[i] = keep[i].masked_scatter(of_slices, selection.keep)
        return tokens, keep

    def texts(
        self, input_ids: torch.Tensor | None, placeholders: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, T], true for what the selector reads of each prompt."""
        text = ~placeholders
        if attention_mask is not None:
            text = text & attention_mask[:, -text.shape[1] :].bool()
        if self.reads != "question":
            return text
        if input_ids is None:
            raise ValueError("the selector finds the question by its token ids: give input_ids, not inputs_embeds")
        return text & question_mask(input_ids, self.turns)

    def placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """[B, T], true where a visual token belongs."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)

    def marker_embeddings(self) -> dict[str, torch.Tensor]:
        """Embedding [D] of each marker: of its token, or its own where it has none."""
        embeddings = dict(self.markers.items())
        if ids := self.config.vision_config.marker_ids:
            table: Any = self.get_input_embeddings()
            rows = table(torch.tensor(list(ids.values()), device=table.weight.device))
            embeddings |= zip(ids, rows, strict=True)
        return embeddings

    def unused(self, images: bool) -> list[torch.Tensor]:
        """What is to get zero gradients in a batch: the parameters of all vision modules. images: whether it had any;
        some use neither slices nor their markers nor the selector.

        A sharded vision tower has to run in every process: on a black view, whose tokens get the zeros.
        """
        modules = (self.multi_modal_projector, self.selector, self.markers, self.vision_tower)
        found = [p for module in modules if module is not None for p in module.parameters()]
        whole: list[torch.Tensor] = [p for p in found if not is_sharded(p)]
        if images or not self.policy.one_view or len(whole) == len(found):
            return whole
        (view,) = self.policy.plan((64, 64)).views
        table: Any = self.get_input_embeddings()
        black = torch.zeros(1, 3, *view.size, dtype=self.vision_tower.dtype, device=table.weight.device)
        features: Any = self.get_image_features(black, return_dict=True)
        return [*features.pooler_output, *whole]

    def splice(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, visual_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Put visual tokens [count, D] on the placeholders of embeddings [B, T, D], in order.

        Raises ValueError if there are not exactly as many placeholders as visual tokens.
        """
        mask = self.placeholders(input_ids, inputs_embeds)
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
        order; image_sizes [V, 3], which slicing needs.

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
        visual_tokens = dropped_mask = None
        if encoded is not None:
            tokens, keep = self.select(encoded, input_ids, inputs_embeds, attention_mask)
            visual_tokens = torch.cat(tokens, dim=0)
            if self.selector is not None and not encoded.get("selected"):
                valid = with_kept(self.placeholders(input_ids, inputs_embeds), keep)
                attention_mask = dropped_mask = hidden_from(attention_mask, valid, past_key_values)
                if position_ids is None:  # as if the dropped tokens were not there
                    counted: Any = (attention_mask.cumsum(-1) - 1).clamp(min=0)
                    position_ids = counted[:, -valid.shape[1] :]
            inputs_embeds = self.splice(input_ids, inputs_embeds, visual_tokens)
        if torch.is_grad_enabled() and (encoded is None or not self.policy.one_view):
            inputs_embeds = with_zero_gradients(inputs_embeds, self.unused(encoded is not None))
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
            attention_mask=dropped_mask,
        )
        return result.to_tuple() if return_dict is False else result


class MoeVisionForConditionalGeneration(MoeVisionPreTrainedModel, MoeVisionGenerationMixin):
    """The fused model with its language modelling head: trains with `labels`, generates with `generate`."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MoeVisionConfig) -> None:
        super().__init__(config)
        self.model = MoeVisionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        table = self.get_input_embeddings()
        (path,) = (name for name, module in self.named_modules() if module is table)  # families differ in where it is
        self._tied_weights_keys = {"lm_head.weight": f"{path}.weight"}
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
        """As `MoeVisionModel.forward`; labels [B, T] hold -100 where nothing is to be learnt, and where they hold the
        image token nothing is learnt either. logits_to_keep: so many positions at the end, all if 0, or these [K]; the
        loss is theirs.
        """
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
            learnt = labels.masked_fill(
                labels == self.config.image_token_id, -100
            )  # TRL's labels are the prompt itself
            if "shift_labels" not in kwargs:
                kwargs["shift_labels"] = nn.functional.pad(learnt, (0, 1), value=-100)[:, 1:][:, keep].contiguous()
            loss = self.loss_function(logits=logits, labels=learnt, vocab_size=vocabulary, **kwargs)
        result = MoeVisionCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            attention_mask=outputs.attention_mask,
        )
        return result.to_tuple() if return_dict is False else result
