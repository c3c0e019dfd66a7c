"""packaging/*-shim: distributions of metadata, installed and uninstalled by pip, and the gates that they are for.

Gates are asked in the environment of the shims, with everything else that is installed here behind it. Where a package
that has a gate is not installed, its logic stands here as its sources have it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
FA3 = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn_interface") is None, reason="flash_attn_interface is not there"
)

pytest.importorskip("setuptools", minversion="70.1", reason="builds wheels")


def run(*command, **more) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=120, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """-> its Python. pip is the one that runs the tests; this environment's packages come before those of here."""
    folder = tmp_path_factory.mktemp("shims")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    here = [sysconfig.get_path("purelib"), *(p for p in sys.path if p and Path(p).is_dir())]
    (own / "here.pth").write_text("\n".join(here))
    sources = [folder / name for name in ("flash-attn-shim", "flash-attn-3-shim")]
    for source in sources:  # builds leave files behind
        source.mkdir()
        (source / "pyproject.toml").write_text((PACKAGING / source.name / "pyproject.toml").read_text("utf-8"))
    pip(python, "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", *sources)
    return python


def pip(python: Path, *arguments) -> str:
    return run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments)


def ask(python: Path, program: str):
    return json.loads(run(python, "-c", "import json\n" + program).splitlines()[-1])


def test_metadata_and_nothing_else(environment):
    for name, version in (("flash-attn", "2.8.3"), ("flash-attn-3", "3.0.0b1")):
        facts = ask(
            environment,
            f"from importlib.metadata import distribution; d = distribution({name!r})\n"
            "print(json.dumps([d.version, d.requires, [str(f) for f in d.files]]))",
        )
        assert facts[:2] == [version, ["flash-attention-plus"]]
        assert {Path(f).parts[0].endswith(".dist-info") for f in facts[2]} == {True}


def test_transformers(environment):
    """By its own code; a GPU is claimed, which the gate asks for too."""
    pytest.importorskip("transformers", minversion="5.0")
    program = (
        "from transformers.utils import import_utils as u\n"
        "u.is_torch_cuda_available = lambda: True\n"
        "print(json.dumps([u.is_flash_attn_2_available(), u.is_flash_attn_greater_or_equal('2.8.3'),"
        " u.is_flash_attn_greater_or_equal('2.8.4'), u.is_flash_attn_4_available()]))"
    )
    assert ask(environment, program) == [True, True, False, False]
    if "flash-attn" not in packages_distributions().get("flash_attn", []):  # else this test tells nothing
        assert json.loads(run(sys.executable, "-c", "import json\n" + program).splitlines()[-1])[0] is False


@FA3
def test_transformers_fa3(environment):
    pytest.importorskip("transformers", minversion="5.0")
    assert ask(
        environment,
        "from transformers.utils import import_utils as u\nu.is_torch_cuda_available = lambda: True\n"
        "print(json.dumps(u.is_flash_attn_3_available()))",
    )


# As in transformer_engine/pytorch/attention/dot_product_attention, 1.x ("<=") and 2.20 ("<").
TRANSFORMER_ENGINE = """
from importlib.metadata import version
from packaging.version import Version
found = Version(version("flash-attn"))
for oldest in ("2.1.1", "2.7.3"):  # the second on Blackwell
    assert Version(oldest) <= found <= Version("2.8.3") and Version(oldest) <= found < Version("2.8.4")
from flash_attn_2_cuda import varlen_bwd
from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func, _flash_attn_forward
from flash_attn.flash_attn_interface import _flash_attn_backward
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward, _flash_attn_varlen_backward
print(json.dumps(True))
"""


def test_transformer_engine(environment):
    pytest.importorskip("packaging")
    assert ask(environment, TRANSFORMER_ENGINE)


@FA3
def test_transformer_engine_fa3(environment):
    pytest.importorskip("packaging")
    program = """
from importlib.metadata import version
from packaging.version import Version
assert Version("3.0.0b") < Version(Version(version("flash-attn-3")).public) < Version("3.0.0")
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_interface import _flash_attn_forward, _flash_attn_backward
print(json.dumps(True))
"""
    assert ask(environment, program)


# As in diffusers/utils/import_utils.py and models/attention_dispatch.py, 0.42: the name that is imported must also be a
# distribution's.
DIFFUSERS = """
from importlib.metadata import version
from importlib.util import find_spec
def available(name):
    return find_spec(name) is not None and version(name)
if find_spec("diffusers"):
    from diffusers.utils import import_utils as u
    fa2, fa3 = u.is_flash_attn_available() and u.is_flash_attn_version(">=", "2.6.3"), u.is_flash_attn_3_available()
else:
    fa2, fa3 = available("flash_attn") == "2.8.3", available("flash_attn_3") == "3.0.0b1"
print(json.dumps([fa2, fa3, find_spec("flash_attn_3") is not None]))
"""


def test_diffusers(environment):
    fa2, fa3, has_fa3 = ask(environment, DIFFUSERS)
    assert fa2 and fa3 == has_fa3


def test_pip_takes_them_away_again(environment):
    pip(environment, "uninstall", "--quiet", "--yes", "flash-attn", "flash-attn-3")
    left = ask(
        environment,
        "from importlib.metadata import packages_distributions\n"
        "print(json.dumps([d for names in packages_distributions().values() for d in names]))",
    )
    assert not {"flash-attn", "flash-attn-3"} & set(left)
