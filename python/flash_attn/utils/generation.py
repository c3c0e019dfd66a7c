"""Decoding, token by token over a static KV cache: greedy, sampled, speculative; and as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash_attn._errors import InvalidArgument, NotServed

__all__ = [
    "DecoderOnlyOutput",
    "DecodingCGCache",
    "GenerationMixin",
    "InferenceParams",
    "allocate_inference_cache",
    "capture_graph",
    "decode",
    "decode_speculative",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "sample_speculative",
    "update_graph_cache",
]


@dataclass
class InferenceParams:
    """What a model needs to go on where it was.

    seqlen_offset: positions that the caches hold; the caller moves it on after each call. key_value_memory_dict: a
    cache (max_batch_size, max_seqlen, 2, nheads_k, headdim) by layer_idx; layers make those that miss.
    batch_size_offset: the first row of the caches that a call's batch uses. lengths_per_sample (max_batch_size) int32,
    on the device: the positions instead, each row its own (seqlen_offset then only says whether it is above 0).
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen, max_batch_size) -> None:
        """For new sequences; the caches' memory stays."""
        self.max_seqlen, self.max_batch_size = max_seqlen, max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class DecoderOnlyOutput:
    sequences: Tensor  # (batch, seqlen): the prompt and what was decoded
    scores: tuple[Tensor, ...] | None = None  # (batch, vocab_size) for each token decoded


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Writes -inf over all but the top_k largest (and their equals) of the last dimension."""
    logits.masked_fill_(logits < logits.topk(top_k)[0][..., -1:], -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Writes -inf over the least likely ones that together have a probability of at most 1 - top_p. Outside (0, 1):
    nothing."""
    if not 0.0 < top_p < 1.0:
        return
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    logits.masked_fill_(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def _filtered(logits: Tensor, top_k: int, top_p: float, temperature: float) -> Tensor:
    if top_p > 1.0:
        raise InvalidArgument(f"top_p: expected at most 1, got {top_p}")
    logits = logits / temperature
    if top_k > 0:
        modify_logits_for_top_k_filtering(logits, min(top_k, logits.shape[-1]))
    modify_logits_for_top_p_filtering(logits, top_p)
    return logits


def sample(logits: Tensor, top_k=1, top_p=0.0, temperature=1.0) -> Tensor:
    """logits (batch, vocab_size) -> tokens (batch): the largest if top_k is 1, else drawn from the top_k largest (0:
    all), of those from the likeliest that together have probability top_p (0: all)."""
    if top_k == 1:
        return logits.argmax(dim=-1)
    return _filtered(logits, top_k, top_p, temperature).softmax(dim=-1).multinomial(1).squeeze(-1)


def sample_speculative(
    logits: Tensor, logits_draft: Tensor, tokens_draft: Tensor, top_k=1, top_p=0.0, temperature=1.0
) -> tuple[Tensor, Tensor]:
    """Draws from the model's distribution by accepting or correcting a draft's (Leviathan et al., arXiv 2211.17192).

    logits (batch, seqlen + 1, vocab_size), logits_draft (batch, seqlen, vocab_size), tokens_draft (batch, seqlen)
    -> tokens (batch, seqlen + 1), of which the first n (batch), 1 to seqlen + 1, are drawn, and n.
    """
    batch, seqlen = tokens_draft.shape
    if logits.shape[:2] != (batch, seqlen + 1) or logits_draft.shape[:2] != (batch, seqlen):
        raise InvalidArgument(
            f"logits, logits_draft: expected {(batch, seqlen + 1)} and {(batch, seqlen)} (batch, seqlen), "
            f"got {tuple(logits.shape[:2])} and {tuple(logits_draft.shape[:2])}"
        )
    p = _filtered(logits, top_k, top_p, temperature).softmax(dim=-1)
    q = _filtered(logits_draft, top_k, top_p, temperature).softmax(dim=-1)

    def of_draft(x):
        return x.gather(-1, tokens_draft[..., None]).squeeze(-1)

    accepted = torch.rand((batch, seqlen), device=p.device) * of_draft(q) < of_draft(p[:, :-1])
    n = accepted.long().cumprod(dim=-1).sum(dim=-1)  # before the first that was not
    correction = torch.cat([(p[:, :-1] - q).clamp(min=0.0), p[:, -1:]], dim=1)
    rows = torch.arange(batch, device=p.device)
    tokens = torch.nn.functional.pad(tokens_draft, (0, 1))
    tokens[rows, n] = correction[rows, n].multinomial(1).squeeze(-1)
    return tokens, n + 1


def _logits(model, input_ids: Tensor, params: InferenceParams, n: int, vocab_size: int | None) -> Tensor:
    """-> (batch, n, vocab_size), of the last n tokens of input_ids, which follow params.seqlen_offset others."""
    first = params.seqlen_offset
    position_ids = None
    if first > 0:
        positions = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
        position_ids = positions.expand(input_ids.shape)
    cache = getattr(model, "_decoding_cache", None)
    if first > 0 and cache is not None and params is cache.inference_params:
        logits = cache.run(input_ids, position_ids, first)
    else:
        logits = model(input_ids, position_ids=position_ids, inference_params=params, num_last_tokens=n).logits
    return logits[..., :vocab_size]


def _start(model, input_ids, max_length, cg, decoding_seqlens, tensor_parallel) -> InferenceParams:
    batch, seqlen = input_ids.shape
    if max_length <= seqlen:
        raise InvalidArgument(f"max_length: expected more than the prompt's {seqlen} tokens, got {max_length}")
    if not cg:
        return InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    model._decoding_cache = update_graph_cache(
        model, getattr(model, "_decoding_cache", None), batch, seqlen, max_length, decoding_seqlens, tensor_parallel
    )
    params = model._decoding_cache.inference_params
    params.reset(max_length, batch)
    return params


class _Timing:
    """Prints how long a block took, the device's part included."""

    def __init__(self, enabled: bool, device: torch.device, tensor_parallel: int):
        self.enabled, self.device, self.parallel = enabled, device, tensor_parallel > 1

    def _now(self) -> float:
        if self.parallel:
            torch.distributed.barrier()
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def __enter__(self):
        self.began = self._now() if self.enabled else 0.0

    def __exit__(self, kind, *_):
        if self.enabled and kind is None:
            print(f"Prompt processing + decoding time: {(self._now() - self.began) * 1000:.0f}ms")


@torch.no_grad()
def decode(
    input_ids,
    model,
    max_length,
    top_k=1,
    top_p=0.0,
    temperature=1.0,
    eos_token_id=None,
    teacher_outputs=None,
    vocab_size=None,
    tensor_parallel=1,
    cg=False,
    enable_timing=False,
) -> DecoderOnlyOutput:
    """Decodes from input_ids (batch, seqlen) up to max_length tokens, or to where all have eos_token_id at once.

    All sequences have one length. top_k, top_p, temperature: see sample. teacher_outputs (batch, seqlen'): where it has
    a token, that is taken instead of one by the logits. vocab_size: logits beyond it are padding. cg: each step is a
    replayed CUDA graph, with the same values. model: model(input_ids, position_ids=, inference_params=,
    num_last_tokens=).logits, as GPTLMHeadModel has it.
    """
    with _Timing(enable_timing, input_ids.device, tensor_parallel):
        params = _start(model, input_ids, max_length, cg, (1,), tensor_parallel)
        scores, sequences, taught = [], [input_ids], 0 if teacher_outputs is None else teacher_outputs.shape[1]
        while True:
            logits = _logits(model, sequences[-1], params, 1, vocab_size)[:, -1]
            scores.append(logits)
            params.seqlen_offset += sequences[-1].shape[1]
            if params.seqlen_offset < taught:
                token = teacher_outputs[:, params.seqlen_offset]
            else:
                token = sample(logits, top_k=top_k, top_p=top_p, temperature=temperature)
            sequences.append(token[:, None])
            if params.seqlen_offset >= max_length - 1:
                break
            if eos_token_id is not None and bool((token == eos_token_id).all()):
                break
    return DecoderOnlyOutput(torch.cat(sequences, dim=1), tuple(scores))


@torch.no_grad()
def decode_speculative(
    input_ids,
    model,
    model_draft,
    max_length,
    speculative_lookahead=3,
    top_k=1,
    top_p=0.0,
    temperature=1.0,
    eos_token_id=None,
    vocab_size=None,
    tensor_parallel=1,
    cg=False,
    enable_timing=False,
    debug=False,
) -> DecoderOnlyOutput:
    """decode, where model_draft proposes speculative_lookahead tokens and model judges them in one call.

    The tokens have model's distribution; if top_k is 1, they are those of decode. batch 1. cg: not served. debug:
    prints how many tokens each round gave.
    """
    if input_ids.shape[0] != 1:
        raise NotServed(f"input_ids: expected batch 1, got {input_ids.shape[0]}: sequences would differ in length")
    if cg:
        raise NotServed("cg: graphs of a fixed number of tokens do not serve rounds that differ; expected False")
    how = dict(top_k=top_k, top_p=top_p, temperature=temperature)
    with _Timing(enable_timing, input_ids.device, tensor_parallel):
        params = _start(model, input_ids, max_length, False, (), tensor_parallel)
        params_draft = InferenceParams(max_seqlen=max_length, max_batch_size=1)
        sequence, scores = input_ids, []
        while sequence.shape[1] < max_length:
            known = sequence.shape[1]
            proposed, logits_draft = sequence, []
            for _ in range(min(speculative_lookahead, max_length - known - 1)):
                unseen = proposed[:, params_draft.seqlen_offset :]
                logits_draft.append(_logits(model_draft, unseen, params_draft, 1, vocab_size)[:, -1:])
                params_draft.seqlen_offset = proposed.shape[1]
                proposed = torch.cat([proposed, sample(logits_draft[-1][:, -1], **how)[:, None]], dim=1)
            ahead = len(logits_draft)
            logits = _logits(model, proposed[:, params.seqlen_offset :], params, ahead + 1, vocab_size)
            if ahead:
                tokens, n = sample_speculative(logits, torch.cat(logits_draft, 1), proposed[:, known:], **how)
                tokens = tokens[:, : int(n)]
            else:
                tokens = sample(logits[:, -1], **how)[:, None]
            if eos_token_id is not None and bool((tokens == eos_token_id).any()):
                tokens = tokens[:, : int((tokens[0] == eos_token_id).nonzero()[0]) + 1]
            if debug:
                print(f"{tokens.shape[1]} tokens of {ahead} proposed")
            scores += logits[:, : tokens.shape[1]].unbind(1)
            sequence = torch.cat([sequence, tokens], dim=1)
            # What the caches hold beyond the sequence is written over. Its last token they have not seen.
            params.seqlen_offset = sequence.shape[1] - 1
            params_draft.seqlen_offset = min(params_draft.seqlen_offset, sequence.shape[1] - 1)
            if eos_token_id is not None and int(tokens[0, -1]) == eos_token_id:
                break
    return DecoderOnlyOutput(sequence, tuple(scores))


class GenerationMixin:
    """generate(), for a model that decode can call."""

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """-> the caches by layer_idx, for InferenceParams.key_value_memory_dict."""
        raise NotImplementedError

    def generate(
        self,
        input_ids,
        max_length,
        top_k=1,
        top_p=0.0,
        temperature=1.0,
        return_dict_in_generate=False,
        output_scores=False,
        **kwargs,
    ):
        """decode's sequences (batch, seqlen), or with return_dict_in_generate its result, whose scores are None unless
        output_scores. Further arguments: decode's."""
        output = decode(input_ids, self, max_length, top_k=top_k, top_p=top_p, temperature=temperature, **kwargs)
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences


def allocate_inference_cache(
    max_batch_size,
    max_seqlen,
    nheads,
    headdim,
    layers: int | Sequence[int],
    device,
    dtype=torch.float16,
) -> dict[int, Tensor]:
    """-> a cache (max_batch_size, max_seqlen, 2, nheads, headdim) for each layer."""
    shape = (max_batch_size, max_seqlen, 2, nheads, headdim)
    layers = range(layers) if isinstance(layers, int) else layers
    return {i: torch.empty(shape, device=device, dtype=dtype) for i in layers}


@dataclass
class DecodingCGCache:
    """CUDA graphs of decoding steps, by (batch, tokens of a step), over one set of KV caches."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device = None
    dtype = None
    callables: dict = field(default_factory=dict)
    mempool = None
    inference_params: InferenceParams | None = None
    run: Callable | None = None


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotServed(f"cg: CUDA graphs need a model on a CUDA device, this one is on {device.type}; expected False")


@torch.no_grad()
def update_graph_cache(
    model,
    cache,
    batch_size,
    seqlen_og,
    max_seqlen,
    decoding_seqlens=(1,),
    tensor_parallel=1,
    dtype=None,
    n_warmups=2,
) -> DecodingCGCache:
    """-> cache (or a new one, for None), with a graph of a step for each number of tokens in decoding_seqlens.

    Graphs and KV caches are kept unless they are too small or of another device or dtype. cache.run(input_ids,
    position_ids, seqlen): a step after seqlen positions -> logits. The model runs on a CUDA device.
    """
    cache = DecodingCGCache() if cache is None else cache
    parameter = next(iter(model.parameters()))
    device, dtype = parameter.device, parameter.dtype if dtype is None else dtype
    _require_cuda(device)
    if (device, dtype) != (cache.device, cache.dtype) or (
        batch_size > cache.max_batch_size or max_seqlen > cache.max_seqlen
    ):
        cache.callables, cache.mempool, cache.inference_params = {}, None, None
        cache.device, cache.dtype = device, dtype
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        if not hasattr(model, "allocate_inference_cache"):
            raise InvalidArgument("model: expected allocate_inference_cache(batch_size, max_seqlen, dtype)")
        cache.inference_params = InferenceParams(
            max_seqlen=max_seqlen,
            max_batch_size=batch_size,
            seqlen_offset=seqlen_og,
            key_value_memory_dict=model.allocate_inference_cache(batch_size, max_seqlen, dtype),
            lengths_per_sample=torch.full((batch_size,), seqlen_og, dtype=torch.int32, device=device),
        )
        cache.mempool = torch.cuda.graphs.graph_pool_handle()
    for n in decoding_seqlens:
        if (batch_size, n) not in cache.callables:
            cache.callables[batch_size, n] = capture_graph(
                model, cache.inference_params, batch_size, max_seqlen, n, cache.mempool, n_warmups
            )

    def run(input_ids, position_ids, seqlen):
        return cache.callables[tuple(input_ids.shape)](input_ids, position_ids, seqlen)

    cache.run = run
    cache.inference_params.seqlen_offset = 0
    return cache


def capture_graph(
    model, inference_params, batch_size, max_seqlen, decoding_seqlen=1, mempool=None, n_warmups=2
) -> Callable:
    """-> a function (input_ids (batch_size, decoding_seqlen), position_ids, seqlen) -> logits, that replays a graph."""
    device = next(iter(model.parameters())).device
    input_ids = torch.zeros((batch_size, decoding_seqlen), dtype=torch.long, device=device)
    position_ids = torch.zeros_like(input_ids)
    before = inference_params.seqlen_offset
    # Positions come from lengths_per_sample, on the device; the number here only says that this is no first call.
    inference_params.seqlen_offset = max(max_seqlen - decoding_seqlen, 1)
    inference_params.lengths_per_sample.fill_(max_seqlen - decoding_seqlen)

    def step():
        return model(
            input_ids,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=decoding_seqlen,
        ).logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(n_warmups):
            step()
        stream.synchronize()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # NCCL may not run beside a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mempool):
        logits = step()
    inference_params.seqlen_offset = before

    def run(new_input_ids, new_position_ids, seqlen):
        inference_params.lengths_per_sample.fill_(seqlen)
        input_ids.copy_(new_input_ids)
        position_ids.copy_(new_position_ids)
        graph.replay()
        return logits.clone()

    return run
