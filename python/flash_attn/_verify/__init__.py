"""The parts of `python -m flash_attn.verify`: the table of cases, their tensors, the yardstick and the judgement."""
