"""What other packages ask before they use flash_attn, answered with the metadata-only distribution installed.

A package that runs on a CPU is run. Of one that needs a GPU, the gate alone is: its source, unchanged.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_interface

from ecosystem import sources

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "docs"))
import names_table

PACKAGES = (
    "transformers", "diffusers", "accelerate", "trl", "peft", "xformers", "ring_flash_attn", "axolotl",
    "transformer_engine",
)  # fmt: skip
# axolotl and TransformerEngine import it where flash-attn-4 itself is installed, and no other name may be missing.
ABSENT = {"flash_attn.cute.interface._validate_head_dims"}


def test_the_distribution_is_there():
    assert importlib.metadata.version("flash-attn") == flash_attn.__version__ == "2.8.3"
    assert "flash-attn" in importlib.metadata.packages_distributions()["flash_attn"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_that_a_package_imports_is_here(package):
    imported = sources.imports(package)
    assert imported or package in ("accelerate", "trl", "peft")  # they reach it through transformers
    lacking = sorted({f"{m}.{n}".rstrip(".") for m, n in imported if names_table._find(m, n) is None})
    known = {f"{x.module}.{x.name}".rstrip(".") for x in names_table.states()}
    assert set(lacking) <= known, "names that the list of upstream's does not have"
    assert set(lacking) <= ABSENT, f"not here: {', '.join(lacking)}"


TRANSFORMERS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import import_utils

assert import_utils.is_flash_attn_greater_or_equal("2.3.3")
assert not import_utils.is_flash_attn_2_available()  # for want of a GPU, and of nothing else:
import_utils.is_torch_cuda_available = lambda: True
import_utils.is_flash_attn_2_available.cache_clear()
assert import_utils.is_flash_attn_2_available()

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attn_implementation="flash_attention_2", dtype=torch.bfloat16)).bfloat16().eval()
assert model.config._attn_implementation == "flash_attention_2"
ids, mask = torch.randint(1, 100, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
mask[0, :7] = mask[1, 9:] = 0
got = model(ids, attention_mask=mask).logits[mask.bool()].float()
tokens = model.generate(ids[2:], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
from transformers.modeling_flash_attention_utils import _flash_fn, _flash_varlen_fn
import flash_attn
assert _flash_fn is flash_attn.flash_attn_func and _flash_varlen_fn is flash_attn.flash_attn_varlen_func

model.set_attn_implementation("eager")
eager = model(ids, attention_mask=mask).logits[mask.bool()].float()
truth = model.float()(ids, attention_mask=mask).logits[mask.bool()]
assert 0 < (got - truth).square().mean() <= 1.5**2 * (eager - truth).square().mean()
assert tokens.shape == (1, 16)
"""


def test_transformers_takes_us_for_flash_attention_2():
    subprocess.run([sys.executable, "-c", TRANSFORMERS], check=True, timeout=120)


DIFFUSERS = """
import torch, flash_attn
from diffusers.models import attention_dispatch as dispatch

assert dispatch._CAN_USE_FLASH_ATTN and dispatch.flash_attn_func is flash_attn.flash_attn_func
q, k, v = (torch.randn(2, 9, 4, 16).bfloat16() for _ in range(3))
mask = torch.arange(9) < torch.tensor([[5], [9]])
for backend, mask in (("flash", None), ("flash_varlen", None), ("flash_varlen", mask)):
    got = dispatch.dispatch_attention_fn(q, k, v, mask, backend=backend)
    truth = dispatch.dispatch_attention_fn(q.double(), k.double(), v.double(), mask, backend="native")
    assert (got - truth).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
"""


def test_diffusers_calls_us_on_a_cpu():
    """Its gates ask for no device: nothing is patched here."""
    subprocess.run([sys.executable, "-c", DIFFUSERS], check=True, timeout=120)


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (10, 0)])
def test_transformer_engine(capability):
    """Its class of versions and its block of imports, from the wheel: its own import needs CUDA."""
    place = "transformer_engine/pytorch/attention/dot_product_attention"
    utils = ast.parse(sources.text("transformer_engine", f"{place}/utils.py"))
    backends = ast.parse(sources.text("transformer_engine", f"{place}/backends.py"))
    versions = [x for x in utils.body if isinstance(x, ast.ClassDef) and x.name == "FlashAttentionUtils"]
    gates = [x for x in backends.body if isinstance(x, ast.Try) and 'get_pkg_version("flash-attn")' in _source(x)]
    assert len(versions) == len(gates) == 1
    from packaging.version import Version

    names = dict(
        PkgVersion=Version,
        Callable=object,
        get_pkg_version=importlib.metadata.version,
        PackageNotFoundError=importlib.metadata.PackageNotFoundError,
        torch=types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: capability is not None)),
        get_device_compute_capability=lambda: capability,
    )
    _execute(versions, names)
    names["fa_utils"] = names["FlashAttentionUtils"]
    _execute(gates, names)
    assert names["fa_utils"].is_installed and names["fa_utils"].v2_7_0_plus
    assert names["flash_attn_func"] is flash_attn.flash_attn_func
    assert names["_flash_attn_varlen_bwd"] is flash_attn_interface._flash_attn_varlen_backward
    assert names["flash_attn_cuda_bwd"] is flash_attn_interface.flash_attn_gpu.varlen_bwd


def _source(node) -> str:
    return ast.unparse(node).replace("'", '"')


def _execute(nodes, names: dict) -> None:
    exec(compile(ast.Module(nodes, []), "transformer_engine", "exec"), names)


def test_xformers_calls_us():
    """It takes our raw module for its FlashAttention-2. Its operators are registered for CUDA: their functions are
    called here, which call ours."""
    from xformers.ops.fmha import flash

    assert flash.FLASH_VERSION == "2.8.3" and flash._flash_attn_cuda is flash_attn_interface.flash_attn_gpu
    q, k, v, dout = (torch.randn(2, 9, 4, 16) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = flash_attn.flash_attn_func(*leaves, causal=True)
    gradients = torch.autograd.grad(expected, leaves, dout)
    forward, backward = flash._flash_fwd._init_fn, flash._flash_bwd._init_fn
    cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32)
    for starts in (None, cu_seqlens):
        x = [t if starts is None else t.flatten(0, 1) for t in (q, k, v, dout)]
        options = (9, 9, 0.0, 0.25, True, -1, -1)
        out, lse, rng_state = forward(*x[:3], starts, starts, None, *options, False, None)
        assert torch.equal(out.view_as(q), expected)
        got = backward(False, x[3], *x[:3], out, lse, starts, starts, *options, rng_state)
        for mine, theirs in zip(got, gradients, strict=True):
            torch.testing.assert_close(mine.view_as(theirs), theirs, rtol=0, atol=1e-6)


def test_xformers_takes_our_flash_attention_3():
    """It compares the schemas of the operators with those that it calls."""
    import flash_attn_3.flash_attn_interface  # noqa: F401
    from xformers.ops.fmha import flash3

    assert flash3._flash_attention3_incompatible_reason() is None


def test_axolotl_finds_us():
    """axolotl asks whether there is a module flash_attn, and transformers the rest."""
    asked = [s for _, s in sources.files("axolotl") if 'find_spec("flash_attn") is not None' in s]
    assert asked and importlib.util.find_spec("flash_attn") is not None
