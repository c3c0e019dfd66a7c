"""Plots of the page on performance, drawn at build time from the records of benchmarks/results."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results import choose, geometric_mean, only

INK = {"light": "#1b1f24", "dark": "#e2e4e9"}
COLOURS = ["#4169c9", "#e08a2e", "#3a9d74", "#b0529c"]
LEGEND = {"frameon": False, "fontsize": 8, "ncols": 2}
DTYPES = ("fp32", "bf16", "fp16")


def _bars(axes, groups: list[str], series: dict[str, list[float | None]], digits: int) -> None:
    """One group of bars per name, one bar per series; None leaves its place empty."""
    width = 0.8 / len(series)
    for s, (label, values) in enumerate(series.items()):
        known = [(g, v) for g, v in enumerate(values) if v is not None]
        places = [g + (s - (len(series) - 1) / 2) * width for g, _ in known]
        bars = axes.bar(places, [v for _, v in known], width * 0.92, label=label, color=COLOURS[s])
        axes.bar_label(bars, fmt=f"%.{digits}f", fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.16)


def limit(figure) -> None:
    """Fraction of the machine's own fp32 multiply-add peak, both passes, seqlen 4096, headdim 128, one thread"""
    machines = {
        "AMD Zen 4, AVX-512": "amd-epyc-zen4-2vcpu/limit",
        "AMD Zen 3, AVX2": "amd-epyc-zen3-2vcpu/limit",
        "Intel, AVX-512": "intel-xeon-amx-16vcpu/limit-avx512",
        "Intel, AMX": "intel-xeon-amx-16vcpu/limit",
    }
    for axes, direction in zip(figure.subplots(2, 1), ("forward", "backward"), strict=True):
        series = {}
        for label, name in machines.items():
            cell = {"name": direction, "seqlen": 4096, "headdim": 128, "causal": False, "threads": 1, "nheads_q": 1}
            series[label] = [only(name, dtype=dtype, **cell)["of_peak"] for dtype in DTYPES]
        _bars(axes, list(DTYPES), series, 2)
        axes.axhline(1, linewidth=0.8, linestyle=":", color=axes.spines["left"].get_edgecolor())
        axes.set_ylabel(f"{direction}\nfraction of the peak")
    figure.axes[0].legend(**LEGEND)


def peers(figure) -> None:
    """Times as fast as PyTorch's scaled_dot_product_attention, two threads, geometric mean over the shapes"""
    from tables import PEERS

    for axes, (at, direction) in zip(figure.subplots(2, 1), enumerate(("forward", "backward")), strict=True):
        series = {
            label: [
                geometric_mean([r["speedup"] for r in choose(files[at], dtype=dtype)]) if files[at] else None
                for dtype in DTYPES
            ]
            for label, files in PEERS.items()
        }
        _bars(axes, list(DTYPES), series, 2)
        axes.axhline(1, linewidth=0.8, linestyle=":", color=axes.spines["left"].get_edgecolor())
        axes.set_ylabel(f"{direction}\nspeedup")
    figure.axes[0].legend(**LEGEND)


def decode(figure) -> None:
    """Decoding: fraction of the read bandwidth, one query of headdim 128 against 256 MiB, one thread"""
    machines = {"Intel, AMX": "intel-xeon-amx-16vcpu/decode", "AMD Zen 3, AVX2": "amd-epyc-zen3-2vcpu/limit"}
    axes, groups = figure.subplots(), (1, 4, 8)
    series = {}
    for dtype in DTYPES[:2]:
        for label, name in machines.items():
            cells = choose(name, name="decode", dtype=dtype, threads=1, headdim=128)
            of = {r["nheads_q"] // r["nheads_k"]: r["of_peak"] for r in cells}
            series[f"{label}, {dtype}"] = [of.get(g) for g in groups]
    _bars(axes, [f"{g} query head{'s' * (g > 1)} a key head" for g in groups], series, 2)
    axes.set_ylabel("fraction of the bandwidth")
    axes.legend(**LEGEND)


def gpu(figure) -> None:
    """TFLOP/s on one NVIDIA H200 in bf16 by sequence length, headdim 128, causal"""
    styles = {"plus": "Triton (ours)", "torch_fa2": "PyTorch's FlashAttention-2", "torch_cudnn": "cuDNN"}
    for axes, direction in zip(figure.subplots(1, 2), ("forward", "backward"), strict=True):
        for colour, (impl, label) in zip(COLOURS, styles.items(), strict=False):
            wanted = {"headdim": 128, "causal": True, "varlen": False, "tokens": 16384, "nheads_k": 16}
            cells = choose("nvidia-h200/gpu", name=direction, impl=impl, **wanted)
            points = sorted((r["seqlen"], r["tflops"]) for r in cells)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, color=colour)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seqlen")
        axes.set_title(direction, fontsize=10)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("TFLOP/s")


PLOTS = {"limit": limit, "peers": peers, "decode": decode, "gpu": gpu}


def images() -> dict[str, bytes]:
    """-> file names and SVGs, each plot in light and in dark."""
    made = {}
    for mode, ink in INK.items():
        style = {key: ink for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
        style |= {"svg.hashsalt": "flash_attn", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
        for name, draw in PLOTS.items():
            with plt.rc_context(style):
                figure = plt.figure(figsize=(7.2, 5.2 if name in ("limit", "peers") else 3.2), layout="constrained")
                draw(figure)
                file = io.BytesIO()
                figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
                plt.close(figure)
                made[f"{name}-{mode}.svg"] = file.getvalue()
    return made
