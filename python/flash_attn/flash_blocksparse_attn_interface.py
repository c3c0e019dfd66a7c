"""Not served: what upstream's module of this name imports was removed there with version 2."""

raise ImportError(
    "flash_attn.flash_blocksparse_attn_interface is not served: upstream's needs an extension that version 2 removed. "
    "Use flash_attn_func with window_size, or with attn_bias, where -inf hides a key"
)
