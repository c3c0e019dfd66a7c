"""What upstream's build left out, by its names of features: here nothing."""

_FEATURES = (
    *("BACKWARD", "SPLIT", "PAGEDKV", "APPENDKV", "LOCAL", "SOFTCAP", "PACKGQA", "FP16", "FP8", "VARLEN", "CLUSTER"),
    *("HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256", "SM8x", "SM90", "HDIMDIFF64", "HDIMDIFF192"),
)

CONFIG = {
    "build_flags": {
        **{f"FLASHATTENTION_DISABLE_{name}": False for name in _FEATURES},
        "FLASHATTENTION_ENABLE_VCOLMAJOR": True,
        # upstream spells these two both ways
        "FLASH_ATTENTION_DISABLE_HDIMDIFF64": False,
        "FLASH_ATTENTION_DISABLE_HDIMDIFF192": False,
    }
}
