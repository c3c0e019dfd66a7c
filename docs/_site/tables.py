"""Tables of the page on performance, from the records of benchmarks/results."""

from __future__ import annotations

from results import choose, geometric_mean, ratios, records

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
    name, rows = "nvidia-h200/triton", []
    for direction in ("forward", "backward"):
        cells = [_cell(ratios(name, "triton", to, name=direction)) for to in ("torch-fa2", "torch-cudnn")]
        rows.append([f"`triton`, {direction}", *cells])
    return _table(["one NVIDIA H200, bf16", "against PyTorch's FlashAttention-2", "against cuDNN"], rows)


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


TABLES = {"peers": peers, "gpu": gpu, "overhead": overhead}
