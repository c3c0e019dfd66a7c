"""Hugging Face transformers on this library: a small random Llama, padded, against the model's own SDPA.

transformers takes its "flash_attention_2" only on GPUs; any function can join under a name of one's own.
"""

import sys

import torch
from flash_attn import flash_attn_func

try:
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
except ImportError:
    sys.exit("needs transformers 4.53 or newer: pip install transformers")


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **_):
    """query, key, value (batch, nheads, seqlen, headdim); attention_mask (batch, 1, seqlen_q, seqlen_k) bool, or None
    where a causal mask says it all -> (batch, seqlen, nheads, headdim)."""
    bias = None
    if attention_mask is not None:
        bias = torch.where(attention_mask, 0.0, -torch.inf)
    causal = attention_mask is None and module.is_causal and query.shape[2] > 1
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(q, k, v, dropout, scaling, causal, softcap=softcap or 0.0, attn_bias=bias), None


AttentionInterface.register("plus", attention)
AttentionMaskInterface.register("plus", sdpa_mask)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
model = LlamaForCausalLM(config)
ids, mask = torch.randint(100, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
mask[0, :5] = 0  # padding on the left

results = {}
for name in ("sdpa", "plus"):
    model.set_attn_implementation(name)
    out = model(ids, attention_mask=mask, labels=ids)
    (gradient,) = torch.autograd.grad(out.loss, model.model.layers[0].self_attn.q_proj.weight)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    results[name] = (out.logits[mask.bool()], gradient, tokens)

(logits, gradient, tokens), (logits_plus, gradient_plus, tokens_plus) = results["sdpa"], results["plus"]
error = (logits - logits_plus).abs().max().item(), (gradient - gradient_plus).abs().max().item()
print(
    f"max difference to SDPA: logits {error[0]:.1e}, gradient {error[1]:.1e}; same tokens: {tokens.equal(tokens_plus)}"
)
sys.exit(0 if max(error) < 1e-5 and tokens.equal(tokens_plus) else 1)
