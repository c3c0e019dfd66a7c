"""Hugging Face transformers on this library: a small Llama learns one step from padded text, and writes on.

enable() registers our attention and its masks; then any model takes them by name, on any device.
"""

import sys

import torch
from flash_attn.integrations import transformers as plus

try:
    name = plus.enable()  # "attention_plus"
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    sys.exit(f"{error}: pip install transformers")

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = LlamaConfig(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attn_implementation=name,
)  # fmt: skip
model = LlamaForCausalLM(config).to(device)  # or LlamaForCausalLM.from_pretrained(..., attn_implementation=name)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

ids, mask = torch.randint(3, 100, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
mask[0, :5] = 0  # padding on the left
ids, mask = ids.to(device), mask.to(device)

losses = []
for _ in range(2):
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {losses[0]:.3f}, after one step {losses[1]:.3f}")

tokens = {}
for attention in (name, "eager"):
    model.set_attn_implementation(attention)
    tokens[attention] = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
print(f"writes {tokens[name][0, 12:].tolist()}, as eager does: {tokens[name].equal(tokens['eager'])}")
sys.exit(0 if losses[1] < losses[0] and tokens[name].equal(tokens["eager"]) else 1)
