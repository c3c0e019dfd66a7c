"""Tables of the page on performance, from the records of benchmarks/results."""

from __future__ import annotations

from results import choose, geometric_mean, only, ratios, records

# A column of a table: its title, and the files of the forward and of the backward (or None).
PEERS = {
    "AMD Zen 4, AVX-512": ("amd-epyc-zen4-2vcpu/peers", None),
    "AMD Zen 3, AVX2": ("amd-epyc-zen3-2vcpu/peers", "amd-epyc-zen3-2vcpu/peers-backward"),
    "Intel, both on plain AVX-512": ("intel-xeon-amx-2vcpu/peers-avx512", "intel-xeon-amx-2vcpu/peers-backward-avx512"),
    "Intel, AMX": ("intel-xeon-amx-2vcpu/peers", "intel-xeon-amx-2vcpu/peers-backward"),
}


def _cell(values: list[float]) -> str:
    return f"{geometric_mean(values):.2f} × ({min(values):.2f}), {len(values)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peers() -> str:
    rows = []
    for at, direction in enumerate(("forward", "backward")):
        for dtype in ("fp32", "bf16", "fp16"):
            cells = [
                _cell([r["speedup"] for r in choose(files[at], dtype=dtype)]) if files[at] else "not run"
                for files in PEERS.values()
            ]
            rows.append([f"{direction}, {dtype}", *cells])
    return _table(["", *PEERS], rows)


def gpu() -> str:
    rows = []
    for direction in ("forward", "backward"):
        fa2 = ratios("nvidia-h200/gpu", "plus", "torch_fa2", name=direction, varlen=False, tokens=16384)
        cudnn = ratios("nvidia-h200/gpu", "plus", "torch_cudnn", name=direction, varlen=False, tokens=16384)
        rows.append([f"`triton`, {direction}", _cell(fa2), _cell(cudnn)])
    return _table(["one NVIDIA H200, bf16", "against PyTorch's FlashAttention-2", "against cuDNN"], rows)


def gpu_others() -> str:
    """Shapes that some of the others have."""
    rows = []
    packed = ratios("nvidia-h200/gpu-flaggems", "plus", "flaggems", name="forward", varlen=True)
    rows.append(["FlagGems 5.0.2, packed sequences, forward", _cell(packed)])
    for direction in ("forward", "backward"):
        flex = ratios("nvidia-h200/gpu-flex", "plus", "torch_flex", name=direction)
        rows.append([f"compiled FlexAttention, seqlen 8192, {direction}", _cell(flex)])
    return _table(["one NVIDIA H200, bf16", "geometric mean (smallest), shapes"], rows)


def pages() -> str:
    """Decoding from pages, as a part of the rate from the same rows in order, measured in turns."""
    sizes = (16, 64, 256)
    rows = []
    for batch, seqlen, headdim in ((16, 8192, 128), (128, 1024, 64)):
        shape = {"batch": batch, "seqlen": seqlen, "headdim": headdim}
        parts = []
        for size in sizes:
            plus, order = (only("nvidia-h200/gpu", impl=x, page_size=size, **shape) for x in ("plus", "plus_unpaged"))
            parts.append(f"{plus['tbs'] / order['tbs']:.2f}")
        rows.append([f"{batch} sequences of {seqlen} keys, headdim {headdim}", *parts])
    return _table(["one NVIDIA H200, bf16, 32:8 heads", *(f"pages of {n}" for n in sizes)], rows)


def mods() -> str:
    """Milliseconds of the GPU for functions of scores."""
    rows = []
    for mod in dict.fromkeys(r["mod"] for r in choose("nvidia-h200/gpu-mods")):
        row = [mod]
        for name in ("forward", "backward"):
            found = [
                only("nvidia-h200/gpu-mods", name=name, mod=mod, impl=x) for x in ("plus", "plus_option", "torch_flex")
            ]
            row += ["-" if r["us"] is None else f"{r['us'] / 1e3:.2f}" for r in found]
        rows.append(row)
    of = ("ours", "as an option", "FlexAttention")
    head = [
        "8192 queries and keys, 16 heads of 128, bf16; ms",
        *(f"{name}: {x}" for name in ("forward", "backward") for x in of),
    ]
    return _table(head, rows)


def host() -> str:
    """The least of the microseconds that a call keeps the host busy."""
    rows = []
    for impl, words in (("plus", "ours"), ("torch_fa2", "PyTorch's FlashAttention-2")):
        least = [
            min(r["host_us"] for r in choose("nvidia-h200/gpu", name=name, impl=impl) if r["host_us"])
            for name in ("forward", "decode", "backward")
        ]
        rows.append([words, *(f"{us:.0f} µs" for us in least)])
    return _table(["one NVIDIA H200", "forward", "a decode step", "backward"], rows)


def device_tests() -> str:
    """What ran on the GPU, and how it ended."""
    rows = []
    for r in records("nvidia-h200/tests"):
        if r["name"] == "verify":
            what = f"verify: `{r['backend']}`, {r['dtype']}, {r['pass']}"
            rows.append([what, f"{r['cases'] - r['failed']} of {r['cases']}, {r['largest']:.2f} of the bound at most"])
        elif r["name"] == "repeats":
            differing = sum(r["differing"].values())
            rows.append([f"{len(r['differing'])} calls, {r['repeats']} repeats", f"{differing} differ"])
        elif r["name"] == "random problems":
            words = f"{r['agree']} of {r['problems']} agree with the oracle"
            rows.append([f"random problems, both passes, `{r['backend']}`", words])
        else:
            rows.append([f"{r['name']}: {r['program']}", f"{r['errors']} errors"])
    return _table(["on one NVIDIA H200", ""], rows)


def overhead() -> str:
    rows = []
    for machine in ("amd-epyc-zen4-2vcpu", "intel-xeon-amx-2vcpu", "amd-epyc-zen3-2vcpu"):
        data = records(f"{machine}/overhead")
        longest = max(data["memory"], key=lambda m: m["seqlen"])
        rows.append(
            [
                f"`{machine}`",
                f"{data['flash_attn_func_us']:.1f} µs",
                f"{data['sdpa_us']:.1f} µs",
                f"{data['import_ms']:.0f} ms",
                f"{longest['forward_kib'] / 1024:.0f} / {longest['backward_kib'] / 1024:.0f} MiB",
                f"{longest['scores_kib'] / 1024:.0f} MiB",
            ]
        )
    head = ["machine", "a call", "PyTorch's SDPA", "the import", "memory, forward / backward", "the scores alone"]
    return _table(head, rows)


TABLES = {
    "peers": peers, "gpu": gpu, "gpu_others": gpu_others, "pages": pages, "mods": mods, "host": host,
    "device_tests": device_tests, "overhead": overhead,
}  # fmt: skip
