"""cross_entropy_loss under upstream's name."""

from flash_attn.ops._cross_entropy import CrossEntropyLoss, cross_entropy_loss

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]
