"""A BERT encoder without padding: the weights of transformers' BertModel, its layers on packed sequences.

flash_attn.models.bert takes the weights by their names. With use_flash_attn its layers see the tokens alone; what they
give is what transformers' layers give, which compute all of the padded batch.
"""

import sys
import time

import torch

try:
    from flash_attn.models.bert import BertModel, remap_state_dict
    from transformers import BertConfig
    from transformers import BertModel as TheirBertModel
except ImportError as error:
    sys.exit(f"{error}: pip install transformers")

torch.manual_seed(0)
config = BertConfig(vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
theirs = TheirBertModel(config).eval()  # random weights; or TheirBertModel.from_pretrained(...)

config.use_flash_attn = True
ours = BertModel(config).eval()
weights = remap_state_dict({f"bert.{name}": x for name, x in theirs.state_dict().items()}, config)
ours.load_state_dict({name.removeprefix("bert."): x for name, x in weights.items()})

lengths = torch.tensor([400, 90, 20, 150, 7, 60, 33, 210])
mask = torch.arange(max(lengths)) < lengths[:, None]
ids = torch.randint(1, 1000, mask.shape).masked_fill(~mask, 0)

outputs, seconds = {}, {}
for name, model in (("transformers", theirs), ("flash_attn", ours)):
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        with torch.no_grad():
            outputs[name] = model(ids, attention_mask=mask)
        times.append(time.perf_counter() - begin)
    seconds[name] = min(times)

hidden, pooled = (
    (getattr(outputs["flash_attn"], x) - getattr(outputs["transformers"], x)).abs()
    for x in ("last_hidden_state", "pooler_output")
)
difference = max(hidden[mask].max().item(), pooled.max().item())
print(f"{mask.sum()} tokens of {mask.numel()} rows; the rest is padding, and is not computed")
print(", ".join(f"{name} {t * 1000:.0f} ms" for name, t in seconds.items()), f"- largest difference {difference:.1e}")
sys.exit(0 if difference < 1e-5 else "Packing changed the result.")
