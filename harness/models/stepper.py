"""A model as beam search sees it: read the sources, then one step at a time for all running outputs.

One step is a forward pass of the model itself, in which the N outputs of a sentence stand where a batch has positions:
they are N queries on one tree of keys and values (`tree.py`). So adapters, quantised weights and the hooks of ZeRO-3
work as in training, and what outputs share is computed and read once.

Shapes: R sentences, N running outputs of each, S source positions, P positions of the decoder's prefix, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from harness.errors import ConfigError
from harness.io.heap import kept_heap
from harness.models.packed import packed
from harness.models.tree import Slots, Tree, merge
from harness.plan.parameters import position_limit

MASKABLE = ("eager", "sdpa")  # attention that takes any mask
KINDS = {"full_attention", "sliding_attention"}  # of decoder layers that a mask describes
WITH_OWN_MASKS = {"gpt_neo"}  # which go by a token's place in the cache, not by its position


class Stepper:
    """A Hugging Face encoder-decoder or decoder, perhaps with an adapter, for searches with N running outputs."""

    def __init__(self, model: Any, num_outputs: int) -> None:
        self.model, self.num_outputs = model, num_outputs
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        adapter = getattr(model, "active_peft_config", None)
        self.has_virtual_tokens = adapter is not None and adapter.is_prompt_learning
        self.is_encoder_decoder = bool(self.base.config.is_encoder_decoder)
        self.reads_alone = self.has_virtual_tokens and not self.is_encoder_decoder  # one forward pass for each row
        self.num_positions = None if self.is_encoder_decoder else _positions_of_table(self.base, adapter)
        self.takes = inspect.signature(self.base.forward).parameters
        config = self.base.config.get_text_config()
        self.kinds = set(getattr(config, "layer_types", None) or ())
        self.window = getattr(config, "sliding_window", None)
        is_maskable = "position_ids" in self.takes and not self.kinds - KINDS
        if not self.is_encoder_decoder and (not is_maskable or config.model_type in WITH_OWN_MASKS):
            what = f"{config.model_type} cannot be decoded: beams share keys and values, which its attention cannot do"
            raise ConfigError(what, where="evaluation.metrics", hint="evaluation.metrics=[] scores the loss alone")

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model in evaluation mode, with attention that takes any mask; both are put back afterwards."""
        was_training, attention = self.model.training, self.base.config._attn_implementation
        self.model.eval()
        if attention not in MASKABLE:
            self.base.set_attn_implementation("sdpa" if self.base._supports_sdpa else "eager")
        try:
            with kept_heap(), packed(self.base), torch.no_grad() if was_training else torch.inference_mode():
                yield
        finally:
            if attention not in MASKABLE:
                self.base.set_attn_implementation(attention)
            self.model.train(was_training)

    def read(self, input_ids_RS: Tensor, mask_RS: Tensor, prefix_RP: Tensor) -> tuple[Tensor, Tree]:
        """Logits [R, V] after the prefix, and the tree to go on with. A decoder's prompts are padded at their start."""
        if self.is_encoder_decoder:
            outputs = self.model(
                input_ids=input_ids_RS, attention_mask=mask_RS, decoder_input_ids=prefix_RP, use_cache=True
            )
            return outputs.logits[:, -1].float(), self._translation_tree(outputs.past_key_values, mask_RS)
        input_ids_RS = torch.cat([input_ids_RS, prefix_RP], dim=1)
        mask_RS = torch.cat([mask_RS, torch.ones_like(prefix_RP)], dim=1)
        if self.reads_alone:
            return self._read_after_virtual_tokens(input_ids_RS, mask_RS)
        keep = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
        positions_RS = (mask_RS.cumsum(dim=1) - 1).clamp(min=0)
        outputs = self.model(
            input_ids=input_ids_RS, attention_mask=mask_RS, position_ids=positions_RS,
            past_key_values=DynamicCache(), use_cache=True, **keep,
        )  # fmt: skip
        tree = self._tree(outputs.past_key_values, mask_RS, positions_RS)
        return outputs.logits[:, -1].float(), tree

    def step(self, tree: Tree, tokens_RN: Tensor, parents_RN: Tensor, is_open_R: Tensor) -> Tensor:
        """Logits [R, N, V] after one more token of each output; `parents_RN` tells which output it goes on from.

        A sentence that is not open any more stays at its position, so that it never leaves the model's table of them.
        """
        tree.branch(parents_RN)
        if self.is_encoder_decoder:
            assert tree.cross_bias_RS is not None
            source = tree.cross_bias_RS[:, None, None, :]
            with self._positions(tree):
                outputs = self.base(
                    encoder_outputs=(tree.cross[0][0],), attention_mask=source, decoder_input_ids=tokens_RN,
                    decoder_attention_mask=tree.bias_RNC.unsqueeze(1), past_key_values=tree.cache(), use_cache=True,
                )  # fmt: skip
        else:
            outputs = self.base(
                input_ids=tokens_RN, attention_mask=self._mask(tree), past_key_values=tree.cache(), use_cache=True,
                position_ids=tree.positions_R.unsqueeze(1).expand_as(tokens_RN),
            )  # fmt: skip
        tree.positions_R = tree.positions_R + is_open_R
        tree.longest += 1
        logits_RNV: Tensor = outputs.logits.float()
        return logits_RNV

    def merge(self, *parts: tuple[Tree, Tensor]) -> Tree:
        """One tree of the named sentences of each tree, with room for more steps."""
        return merge(parts, self.num_outputs)

    def _translation_tree(self, cache: Any, mask_RS: Tensor) -> Tree:
        own = cache.self_attention_cache
        cross = [(layer.keys, layer.values) for layer in cache.cross_attention_cache.layers]
        num_virtual = cross[0][0].shape[2] - mask_RS.shape[1]  # in front of the source
        mask_RS = functional.pad(mask_RS, (num_virtual, 0), value=1)
        prefix_RP = mask_RS.new_ones((len(mask_RS), own.get_seq_length()))
        tree = self._tree(own, prefix_RP, prefix_RP.cumsum(dim=1) - 1)
        tree.cross, tree.cross_bias_RS = cross, _bias(mask_RS, cross[0][0].dtype)
        return tree

    def _tree(self, cache: Any, mask_RC: Tensor, positions_RC: Tensor) -> Tree:
        """The tree of what has been read; one output, until `merge` makes it N."""
        slots = [Slots(layer.keys, layer.values, mask_RC.shape[1]) for layer in cache.layers]
        bias_RC = _bias(mask_RC, cache.layers[0].keys.dtype)
        next_R = positions_RC[:, -1] + 1
        return Tree(slots, [], bias_RC.unsqueeze(1), positions_RC, next_R, None, mask_RC.shape[1])

    def _read_after_virtual_tokens(self, input_ids_RS: Tensor, mask_RS: Tensor) -> tuple[Tensor, Tree]:
        """One row at a time: PEFT gives a decoder's virtual tokens and padding positions of their own."""
        logits, trees = [], []
        for ids_S, mask_S in zip(input_ids_RS, mask_RS.bool(), strict=True):
            outputs = self.model(
                input_ids=ids_S[mask_S].unsqueeze(0), attention_mask=mask_RS.new_ones((1, int(mask_S.sum()))),
                use_cache=True,
            )  # fmt: skip
            cache = outputs.past_key_values
            seen_1C = mask_RS.new_ones((1, cache.get_seq_length()))
            logits.append(outputs.logits[:, -1].float())
            trees.append((self._tree(cache, seen_1C, seen_1C.cumsum(dim=1) - 1), mask_RS.new_zeros(1)))
        return torch.cat(logits), self.merge(*trees)

    def _mask(self, tree: Tree) -> Any:
        """The 4D mask of a decoder's layers; one of each kind where some layers see only a window."""
        full = tree.bias_RNC.unsqueeze(1)
        if self.window is None or self.kinds == {"full_attention"}:
            return full
        is_outside_RC = tree.slot_positions_RC <= tree.positions_R.unsqueeze(1) - self.window
        near = full.masked_fill(is_outside_RC[:, None, None, :], torch.finfo(full.dtype).min)
        return {"full_attention": full, "sliding_attention": near} if self.kinds else near

    @contextmanager
    def _positions(self, tree: Tree) -> Iterator[None]:
        """Within, the decoder takes the positions of the tree where it would count from the length of its cache."""
        decoder = self.base.get_decoder()
        if hasattr(decoder, "embed_positions"):
            module, name = decoder.embed_positions, "forward"
        else:
            module, name = decoder.block[0].layer[0].SelfAttention, "compute_bias"
        replaced = _relative_bias if name == "compute_bias" else _embedded
        own = vars(module).get(name)  # another library's hook
        setattr(module, name, lambda *args, **kwargs: replaced(module, tree))
        try:
            yield
        finally:
            delattr(module, name)
            if own is not None:
                setattr(module, name, own)


def _embedded(module: Any, tree: Tree) -> Tensor:
    """[R, 1, width]: embeddings of the positions of the next tokens."""
    if not hasattr(module, "weights"):  # mBART, Marian
        return functional.embedding(tree.positions_R + getattr(module, "offset", 0), module.weight).unsqueeze(1)
    first = module.padding_idx + 1  # M2M100, whose table may grow
    if first + tree.longest >= len(module.weights):
        module.make_weights(first + tree.longest + 1 + module.offset, module.embedding_dim, module.padding_idx)
    embedded: Tensor = module.weights.index_select(0, tree.positions_R + first).unsqueeze(1)
    return embedded


def _relative_bias(module: Any, tree: Tree) -> Tensor:
    """T5's bias [R, H, 1, C] by the distance of each slot."""
    distance_R1C = (tree.slot_positions_RC - tree.positions_R.unsqueeze(1)).unsqueeze(1)
    buckets_R1C = module._relative_position_bucket(
        distance_R1C,
        bidirectional=False,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    bias: Tensor = module.relative_attention_bias(buckets_R1C).permute(0, 3, 1, 2)
    return bias


def _positions_of_table(base: Any, adapter: Any) -> int | None:
    """How many tokens the table of positions of a decoder holds, virtual tokens aside; None if it has no table."""
    positions = position_limit(base.config.to_dict())
    virtual = adapter.num_virtual_tokens if adapter is not None and adapter.is_prompt_learning else 0
    return None if positions is None else positions - virtual


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is true, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, torch.finfo(dtype).min)
