"""Hugging Face transformers on this library, with any model and on any device.

    from flash_attn.integrations import transformers
    transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="attention_plus")

transformers takes its own "flash_attention_2" on GPUs only, and rewrites names with "flash" in them for some models;
hence a name of our own. Two functions are registered under it: `attention`, which layers call, and `mask`, which makes
the mask that they call it with.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from flash_attn import flash_attn_func
from flash_attn._errors import InvalidArgument, NotServed
from flash_attn.integrations._attend import as_bias, attend, attend_packed
from flash_attn.integrations._mask_functions import read
from flash_attn.integrations._row_mask import RowMask, row_mask

NAME = "attention_plus"
OLDEST = "4.53"  # the first with AttentionMaskInterface

# What models hand to every attention function alike, and why attention can do without.
HARMLESS = {
    "cache": "the cached keys have joined `key` already",
    "past_key_value": "the cached keys have joined `key` already",
    "past_key_values": "the cached keys have joined `key` already",
    "use_cache": "the layer writes the cache, not its attention",
    "cache_position": "the mask says where the queries stand",
    "position_embeddings": "query and key are rotated already",
    "layer_idx": "tells layers apart, and attention is the same in all",
    "num_items_in_batch": "of the loss",
    "labels": "of the loss",
    "logits_to_keep": "of the head",
    "output_hidden_states": "of the model's output",
    "output_router_logits": "of the model's output",
    "return_dict": "of the model's output",
    "seq_idx": "of state-space layers; the mask or cu_seq_lens says it to attention",
}

_masking_utils = None  # transformers' module, once it was asked for


def enable(name: str = NAME) -> str:
    """Registers attention and mask under `name`, for attn_implementation=name. -> name."""
    if "flash" in name:
        raise InvalidArgument(
            f"name: expected one without 'flash', which transformers rewrites for some models, got {name!r}"
        )
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"needs transformers {OLDEST} or newer, found {_found()}") from error
    _transformers_masks()
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def _transformers_masks():
    """transformers' module of masks, imported once: torch.compile cannot trace the import."""
    global _masking_utils
    if _masking_utils is None:
        from transformers import masking_utils as _masking_utils
    return _masking_utils


def _found() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return "none"


def attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    indices: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """query (batch, nheads, seqlen_q, headdim), key, value (batch, nheads_k, seqlen_k, ...)
    -> out (batch, seqlen_q, nheads, headdim_v), and None in place of the weights, which nobody holds.

    attention_mask is one of: what `mask` made; (batch, seqlen_k) with 1 for tokens and 0 for padding; (batch|1,
        nheads|1, seqlen_q, seqlen_k), bool (True where a key is seen) or added to the scores; None: is_causal (else
        module.is_causal) and sliding_window say it all, with the last query at the last key.
        Where a mask is causal, queries that are padding give 0: a loss must not look at them. (The one before the
        first token of a row predicts that token: its label is -100.)
    sliding_window: as transformers has it, a query sees `sliding_window` keys back, itself included. A mask that is
        given has its window already.
    s_aux (nheads): sinks. position_bias (batch|1, nheads|1, seqlen_q, seqlen_k): added to the scores.
    cu_seq_lens_q, cu_seq_lens_k (n + 1), max_length_q, max_length_k: several sequences in one row. Without them
        position_ids (batch|1, seqlen) that start anew say it of a causal mask without padding.
    indices (batch, seqlen_q, n) int: a query sees these keys alone, of those that the mask lets it see (DeepSeek-V3.2).
        They are a mask of seqlen_q x seqlen_k here, as they are in "eager".
    """
    _check_others(others)
    query, key, value = _as_autocast(query, key, value)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = dict(
        dropout_p=dropout,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        learnable_sink=None if s_aux is None else _as_sink(s_aux, q.shape[2]),
        deterministic=bool(deterministic),
    )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    left = -1 if sliding_window is None else sliding_window - 1
    right = 0 if is_causal else left
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if indices is not None:
            raise NotServed("indices: not served beside cu_seq_lens_q and cu_seq_lens_k, which pack sequences")
        if isinstance(attention_mask, RowMask) and attention_mask.padding == "none":
            left, right = attention_mask.left, attention_mask.right
        elif attention_mask is not None:
            raise InvalidArgument(
                "attention_mask: expected none beside cu_seq_lens_q and cu_seq_lens_k, which pack sequences"
            )
        if position_bias is not None:
            raise NotServed("position_bias: not served beside cu_seq_lens_q and cu_seq_lens_k, which pack sequences")
        starts_q = _as_starts("q", cu_seq_lens_q, max_length_q)
        starts_k = _as_starts("k", cu_seq_lens_k, max_length_k)
        return attend_packed(q, k, v, starts_q, starts_k, left, right, scores), None
    if attention_mask is not None and attention_mask.dim() == 4 and not isinstance(attention_mask, RowMask):
        if indices is not None:
            attention_mask = _chosen(attention_mask, indices, q.shape[1], k.shape[1])
        return _attend_dense(q, k, v, attention_mask, position_bias, scores), None
    if attention_mask is None or attention_mask.dim() == 2:
        attention_mask, k, v = _own_mask(q, k, v, attention_mask, left, right)
    expected = (q.shape[0], 1, q.shape[1], k.shape[1])
    if not isinstance(attention_mask, RowMask) or attention_mask.shape != expected:
        got = tuple(attention_mask.shape)
        raise InvalidArgument(f"attention_mask: expected {expected} or (batch, seqlen_k), got {got}")
    if position_ids is not None:
        attention_mask = _with_sequences(attention_mask, position_ids)
    if indices is not None:
        attention_mask = _chosen(attention_mask.dense(), indices, q.shape[1], k.shape[1])
        return _attend_dense(q, k, v, attention_mask, position_bias, scores), None
    bias = None if position_bias is None else position_bias.expand(-1, -1, -1, k.shape[1])
    return attend(q, k, v, attention_mask, scores, bias), None


def _check_others(others: dict) -> None:
    if others.pop("output_attentions", None):
        raise NotServed("output_attentions: weights are never held as a whole; attn_implementation='eager' shows them")
    unknown = [name for name, value in others.items() if value is not None and name not in HARMLESS]
    if unknown:
        raise NotServed(
            f"{', '.join(unknown)}: not known to {NAME}, and may change what attention means; this model needs another "
            "attn_implementation ('sdpa' or 'eager')"
        )


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast PyTorch's own attention runs in autocast's dtype, whatever comes in."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _as_sink(s_aux: Tensor, nheads: int) -> Tensor:
    if s_aux.numel() != nheads:
        raise InvalidArgument(f"s_aux: expected one sink per head, ({nheads}), got {tuple(s_aux.shape)}")
    return s_aux.flatten()


def _as_starts(side: str, cu_seq_lens: Tensor | None, max_length) -> tuple[Tensor, int]:
    if cu_seq_lens is None:
        raise InvalidArgument(f"cu_seq_lens_{side}: expected beside its counterpart, got None")
    if max_length is None:
        max_length = cu_seq_lens.diff().max()
    return cu_seq_lens.to(torch.int32), int(max_length)


def _attend_dense(q, k, v, attention_mask: Tensor, position_bias: Tensor | None, scores: dict) -> Tensor:
    bias = as_bias(attention_mask, q.dtype) if attention_mask.dtype == torch.bool else attention_mask
    bias = bias.expand(-1, -1, -1, k.shape[1])
    return flash_attn_func(q, k, v, attn_bias=bias if position_bias is None else bias + position_bias, **scores)


def _chosen(mask: Tensor, indices: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The mask (batch|1, nheads|1, seqlen_q, seqlen_k), bool or added, without the keys that are not among indices."""
    if indices.dim() != 3 or indices.shape[1] != seqlen_q or indices.is_floating_point():
        got = f"{tuple(indices.shape)} {indices.dtype}"
        raise InvalidArgument(f"indices: expected integers (batch, {seqlen_q}, n), got {got}")
    chosen = torch.zeros((*indices.shape[:2], seqlen_k), dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter_(-1, indices.long(), True)[:, None]
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, -torch.inf)


def _own_mask(q, k, v, padding_mask: Tensor | None, left: int, right: int) -> tuple:
    """Where `mask` was not asked. -> RowMask, and the keys and values that it speaks of."""
    if padding_mask is not None and padding_mask.shape[1] < k.shape[1]:  # the used rows of a static cache
        k, v = k[:, : padding_mask.shape[1]], v[:, : padding_mask.shape[1]]
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if padding_mask is not None:
        padding_mask = padding_mask[:, -seqlen_k:].bool()
    shape, shift = (batch, seqlen_q, seqlen_k), seqlen_k - seqlen_q
    return row_mask(shape, q.device, padding_mask=padding_mask, shift=shift, left=left, right=right), k, v


def _with_sequences(mask: RowMask, position_ids: Tensor) -> RowMask:
    """The mask of packed sequences, where position_ids (batch|1, seqlen) start anew and the mask does not say so: it
    was made without them (gpt-oss), or not by us. Looked at once per mask, not per layer."""
    batch, _, seqlen, seqlen_k = mask.shape
    says_all = mask.sequence is not None or mask.padding != "none" or mask.right != 0
    if says_all or position_ids.dim() != 2 or not position_ids.shape[1] == seqlen == seqlen_k:
        return mask
    if torch.compiler.is_compiling() or seqlen == 1:
        return mask
    if (packed := getattr(mask, "_packed", None)) is None:
        sequence = torch.nn.functional.pad((position_ids.diff(dim=-1) != 1).cumsum(-1), (1, 0)).expand(batch, -1)
        packed = False
        if sequence[:, -1].any():
            packed = row_mask((batch, seqlen, seqlen), mask.device, left=mask.left, right=0, sequence=sequence)
        mask._packed = packed
    return mask if packed is False else packed


def mask(*, mask_function, attention_mask: Tensor | None = None, device="cpu", **arguments) -> Tensor | None:
    """transformers asks for (batch, 1, seqlen_q, seqlen_k). -> RowMask; what is none, or is being traced, dense. Models
    that know "eager" only add masks to scores of their own, or to other masks: eager's masks for them.

    mask_function(batch, head, query, key) -> bool; attention_mask (batch, tokens so far) bool, None without padding;
    arguments: batch_size, q_length, kv_length, q_offset and kv_offset (query i stands at q_offset + i, key j at
    kv_offset + j), and options of the other mask makers. transformers 4 has cache_position (q_length), the positions
    themselves.
    """
    masking_utils = _transformers_masks()
    if (config := arguments.get("config")) is not None and _knows_eager_only(type(config)):
        return _eager_mask(masking_utils, mask_function, attention_mask, device, arguments)
    if _is_traced(attention_mask):
        # None means "causal, the last query at the last key" to `attention`. It says nothing of windows.
        causal = attention_mask is None and mask_function is masking_utils.causal_mask_function
        if causal and arguments.get("allow_is_causal_skip", True) and _is_square(arguments):
            return None
        return _dense_mask(masking_utils, mask_function, attention_mask, device, arguments)
    if (rule := read(mask_function, masking_utils)) is None:
        return _dense_mask(masking_utils, mask_function, attention_mask, device, arguments)
    batch, seqlen_k, kv_offset = arguments["batch_size"], arguments["kv_length"], arguments.get("kv_offset", 0)
    if "cache_position" in arguments:
        positions = arguments["cache_position"]
        seqlen_q, q_offset, device = positions.shape[0], positions[0], positions.device
    else:
        seqlen_q, q_offset = arguments["q_length"], arguments.get("q_offset", 0)
    shape, shift = (batch, seqlen_q, seqlen_k), q_offset - kv_offset
    if attention_mask is not None:
        missing = max(seqlen_k + kv_offset - attention_mask.shape[-1], 0)
        attention_mask = torch.nn.functional.pad(attention_mask.bool(), (0, missing))
        attention_mask = attention_mask[:, kv_offset : kv_offset + seqlen_k]
    return row_mask(shape, torch.device(device), padding_mask=attention_mask, shift=shift, **rule._asdict())


@torch.compiler.assume_constant_result
def _knows_eager_only(config_class: type) -> bool:
    """Whether the models of this configuration support neither sdpa nor flash or flex attention (deepseek-v4)."""
    return _supports_nothing(config_class)


@functools.cache
def _supports_nothing(config_class: type) -> bool:
    modeling = sys.modules.get(config_class.__module__.replace("configuration_", "modeling_"))
    models = [x for x in vars(modeling).values() if hasattr(x, "config_class")] if modeling else []
    models = [x for x in models if x.__module__ == modeling.__name__ and x.config_class in (config_class, None)]
    supports = ("_supports_sdpa", "_supports_flash_attn", "_supports_flash_attn_2", "_supports_flex_attn")
    return bool(models) and not any(getattr(x, name, False) for x in models for name in supports)


def _eager_mask(masking_utils, mask_function, attention_mask, device, arguments: dict) -> Tensor | None:
    if "q_length" in arguments:
        arguments["device"] = device
    return masking_utils.eager_mask(mask_function=mask_function, attention_mask=attention_mask, **arguments)


def _is_traced(x: Tensor | None) -> bool:
    from torch._subclasses.fake_tensor import is_fake

    return torch.compiler.is_compiling() or torch.jit.is_tracing() or (x is not None and is_fake(x))


def _is_square(arguments: dict) -> bool:
    seqlen_q = arguments["q_length"] if "q_length" in arguments else arguments["cache_position"].shape[0]
    return seqlen_q == arguments["kv_length"]


def _dense_mask(masking_utils, mask_function, attention_mask, device, arguments: dict) -> Tensor | None:
    if "q_length" in arguments:
        arguments["device"] = device
    if not _is_square(arguments):  # sdpa_mask leaves out masks that are causal from the top left, too
        arguments["allow_is_causal_skip"] = False
    return masking_utils.sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **arguments)
