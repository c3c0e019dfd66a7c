"""FlashAttention-3's names: thin adapters over the path of FlashAttention-2's.

interface.py   the public functions, with upstream's signatures; private.py: those that others import all the same
attend.py      one call, with or without a KV cache: qv and fp8 inputs become ordinary attention
merge.py       qv: queries [q | qv] and keys [k | v]
fp8.py         fp8 inputs: converted to bf16
combine.py     flash_attn_combine
operators.py   torch.ops.flash_attn_3.*
"""
