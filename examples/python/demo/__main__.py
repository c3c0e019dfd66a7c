"""What this machine has; how exact and how fast attention is on it; and a small GPT, trained and sampled.

python examples/python/demo            about two and a half minutes on two cores; writes demo/report.html
python examples/python/demo --quick    the same in seconds, with little training
python examples/python/demo --device cuda   on a GPU, the default where torch sees one
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# PyTorch's idle threads sleep rather than spin: on a busy machine the spinning costs more than all the arithmetic.
# The variable is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import flash_attn
import torch
from compare import CASES, QUICK_CASES, Result, alternate
from compare import run as compare
from gpt import GPT, Attention, Config, Step, flash, sample, sdpa, train
from report import Report, comparison, losses
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from text import ROOT, Batch, Passages, documents, split

SEED = 7


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    compare_seconds: float  # for each case
    cases: list
    config: Config
    tokens: int  # of one step
    train_seconds: float
    train_steps: int
    sampled: int  # bytes


FULL = Scale(1.5, CASES, Config(), 1024, 85.0, 10_000, 400)
QUICK = Scale(0.05, QUICK_CASES, Config(layers=2, nheads=2, headdim=32, context=128), 1024, 300.0, 40, 40)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.machine()


def device_name(device: str) -> str:
    return "" if device == "cpu" else getattr(torch, torch.device(device).type).get_device_name()


def show_machine(console: Console, report: Report, device: str) -> None:
    rows = [("device", device_name(device))] if device != "cpu" else []
    rows += [
        ("processor", f"{processor()} ({platform.machine()})"),
        ("instruction set", f"{flash_attn.cpu_isa()} (usable here: {', '.join(flash_attn.cpu_isas())})"),
        ("threads", f"{flash_attn.num_threads()} (PyTorch: {torch.get_num_threads()})"),
        ("versions", f"flash_attn {flash_attn.__plus_version__}, torch {torch.__version__}"),
    ]
    for backend in flash_attn.backends():
        verdict = f"not here: {backend.unavailable}" if backend.unavailable else "usable"
        rows.append((f"backend {backend.name}", f"{verdict}. {backend.description}"))
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    report.heading("This machine")
    report.table((), rows, numbers_from=2)


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.1f}" if ms >= 10 else f"{ms:.3f}"


def show_comparison(console: Console, report: Report, scale: Scale, device: str) -> list[Result]:
    results = []
    with progress(console) as bar:
        task = bar.add_task("comparing", total=len(scale.cases), note="")
        for result in compare(scale.cases, scale.compare_seconds, device):
            results.append(result)
            bar.update(task, advance=1, note=result.case.name)
    header = ("case", "error", "SDPA's", "ms", "SDPA's", "faster")
    rows = [
        (
            result.case.name,
            f"{result.error:.1e}",
            f"{result.error_sdpa:.1e}",
            milliseconds(result.seconds),
            milliseconds(result.seconds_sdpa),
            f"{result.speedup:.2f} x",
        )
        for result in results
    ]
    table = Table(*header, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
    report.heading("Exactness and speed against PyTorch")
    report.paragraph(
        "Forward passes on the same random tensors, device and threads. Errors are the largest of any output, against "
        "the formula computed in float64. Times are the least of several, the two taken in turns; the last column is "
        "their ratio. A case is sequences x length, heads (/ heads of k and v), headdim, mask, dtype. For packed "
        "sequences PyTorch's scaled_dot_product_attention (SDPA) is called once for each."
    )
    report.table(header, rows, numbers_from=1)
    report.plot(comparison(results), "speed and error of each case")
    return results


@dataclass(frozen=True)
class Gradients:
    """|g - g64| / |g64| over all parameters of the model, where g64 is the same step in float64."""

    flash: float
    sdpa: float

    @property
    def agree(self) -> bool:
        return self.flash <= 2 * self.sdpa


def check_gradients(model: GPT, batch: Batch) -> Gradients:
    """One training step's gradient: by our attention, by PyTorch's, and by PyTorch's in float64."""

    def gradient(model: GPT, attention: Attention) -> torch.Tensor:
        grads = torch.autograd.grad(model.loss(batch, attention), list(model.parameters()))
        return torch.cat([grad.flatten().double() for grad in grads])

    exact = gradient(copy.deepcopy(model).double(), sdpa)
    errors = [((gradient(model, attention) - exact).norm() / exact.norm()).item() for attention in (flash, sdpa)]
    return Gradients(*errors)


def attention_share(model: GPT, batch: Batch) -> float:
    """The part of a step's forward and backward that is attention, both timed alone and in turns."""
    config = model.config
    device = str(batch.tokens.device)
    qkv = torch.randn(len(batch.tokens), 3, config.nheads, config.headdim, device=device, requires_grad=True)
    dout = torch.randn(len(batch.tokens), config.nheads, config.headdim, device=device)

    def attention() -> None:
        torch.autograd.grad(flash(qkv, batch.cu_seqlens, batch.max_seqlen), qkv, dout)

    def step() -> None:
        torch.autograd.grad(model.loss(batch), list(model.parameters()))

    one_layer, whole = alternate(attention, step, seconds=1.0, device=device)
    return config.layers * one_layer / whole


def show_training(console: Console, report: Report, scale: Scale, device: str) -> list[Step]:
    config = scale.config
    texts = documents()
    seen, unseen = split(texts, seed=SEED)
    passages = Passages(seen, config.context, scale.tokens, SEED)
    held_out = Passages(unseen, config.context, 4 * scale.tokens, SEED).draw().to(device)
    torch.manual_seed(SEED)
    model = GPT(config).to(device)

    def draw() -> Batch:
        return passages.draw().to(device)

    parameters = f"{model.parameter_count() / 1e6:.2f}"
    console.print(
        f"{len(texts)} documents of this repository, {sum(len(t.data) for t in texts) / 1e3:.0f} kB, "
        f"{len(unseen)} of them held out. {parameters} M parameters, "
        f"{scale.tokens} bytes a step in passages of up to {config.context}."
    )
    steps: list[Step] = []
    with progress(console) as bar:
        task = bar.add_task("training", total=1.0, note="")
        for step in train(model, draw, held_out, seconds=scale.train_seconds, steps=scale.train_steps):
            steps.append(step)
            latest = next(s.held_out for s in reversed(steps) if s.held_out is not None)
            done = max(step.number / scale.train_steps, step.seconds / scale.train_seconds)
            bar.update(task, completed=done, note=f"step {step.number}, held-out {latest:.2f} bits per byte")
    batch = draw()
    gradients, share = check_gradients(model, batch), attention_share(model, batch)
    packed = len(batch.cu_seqlens) - 1
    first, last = steps[0], steps[-1]
    rows = [
        ("text", f"{len(texts)} documents, {len(unseen)} of them held out"),
        ("model", f"{config.layers} layers, {config.nheads} heads of {config.headdim}, {parameters} M parameters"),
        ("step", f"{scale.tokens} bytes, packed: passages of up to {config.context}, about {packed} of them"),
        ("training", f"{last.number} steps in {last.seconds:.0f} s"),
        ("held-out loss", f"{first.held_out:.2f} bits per byte at first, {last.held_out:.2f} at last"),
        ("attention", f"{share:.0%} of a step's forward and backward"),
        ("gradient", f"off by {gradients.flash:.1e} (relative, to float64); through PyTorch's, {gradients.sdpa:.1e}"),
    ]
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    report.heading("A small GPT, trained here")
    report.paragraph(
        "It learns this repository's own sources and documents byte by byte, by flash_attn_varlen_qkvpacked_func: "
        "the passages of a step lie end to end without padding, and one call attends within each."
    )
    report.table((), rows, numbers_from=2)
    report.plot(losses(steps), "loss of training and held-out documents by step")
    if not gradients.agree:
        raise SystemExit("The gradient through flash_attn has more than twice the error of PyTorch's.")
    if not last.held_out < first.held_out - 1:
        raise SystemExit("The loss did not fall by one bit per byte.")

    prompts = [b"// ", b"def ", b"## The "]
    continuations = [bytearray() for _ in prompts]
    with progress(console) as bar:
        task = bar.add_task("sampling", total=scale.sampled, note="")
        for drawn in sample(model, prompts, scale.sampled, temperature=0.7, seed=SEED):
            for continuation, byte in zip(continuations, drawn, strict=True):
                continuation.append(byte)
            bar.advance(task)
    report.heading("What it writes")
    for prompt, continuation in zip(prompts, continuations, strict=True):
        text = continuation.decode(errors="replace")
        console.rule()
        console.print(prompt.decode(), style="bold", end="", markup=False, highlight=False)
        console.print(text, markup=False, highlight=False)
        report.sample(prompt.decode(), text)
    console.rule()
    return steps


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--report", type=Path, default=ROOT / "demo" / "report.html", help="where the page goes")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, help="default here: %(default)s")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    begin = time.perf_counter()
    console = Console()
    report = Report("FlashAttention-Plus on this machine")

    console.rule("[bold]This machine")
    show_machine(console, report, arguments.device)
    console.rule("[bold]Exactness and speed against PyTorch")
    results = show_comparison(console, report, scale, arguments.device)
    console.rule("[bold]A small GPT, trained here")
    show_training(console, report, scale, arguments.device)

    report.paragraph(f"Made in {time.perf_counter() - begin:.0f} s by examples/python/demo.")
    report.write(arguments.report)
    console.print(f"The report, with the plots: {arguments.report}", soft_wrap=True)
    if inexact := [result.case.name for result in results if not result.exact]:
        sys.exit(f"More than twice PyTorch's error: {'; '.join(inexact)}")


if __name__ == "__main__":
    main()
