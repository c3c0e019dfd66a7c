"""The text to learn: this repository's own sources and documents, byte by byte, packed as passages of ragged length."""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
SUFFIXES = {".c", ".cmake", ".cpp", ".cu", ".h", ".hpp", ".md", ".py", ".sh", ".toml", ".txt", ".yml", ".yaml"}
NOT_OURS = {"build", "demo", "dist"}  # at the top: what is made here
LARGEST = 100_000  # bytes; larger files are data


@dataclass(frozen=True)
class Document:
    path: str
    data: bytes


@dataclass(frozen=True)
class Batch:
    """Passages laid end to end, without padding: passage b is tokens[cu_seqlens[b] : cu_seqlens[b + 1]]."""

    tokens: Tensor  # (total) int64
    targets: Tensor  # (total) int64: the byte that follows
    positions: Tensor  # (total) int64: the place within the passage
    cu_seqlens: Tensor  # (passages + 1) int32
    max_seqlen: int

    def to(self, device: str | torch.device) -> Batch:
        tensors = (self.tokens, self.targets, self.positions, self.cu_seqlens)
        return Batch(*(x.to(device) for x in tensors), self.max_seqlen)


def documents(root: Path = ROOT) -> list[Document]:
    """The texts under `root`, in the order of their paths: what git knows, or, without git, what lies there."""
    listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    found = []
    for name in sorted(set(names)):
        path = root / name
        parts = Path(name).parts
        if (
            path.suffix not in SUFFIXES
            or parts[0] in NOT_OURS
            or any(part.startswith((".", "__")) for part in parts[:-1])
        ):
            continue
        if path.is_file() and 64 <= path.stat().st_size <= LARGEST:
            found.append(Document(name, path.read_bytes()))
    return found


def split(texts: list[Document], held_out: float = 0.1, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """(train, held out): whole documents, so that nothing of a held-out one was ever seen."""
    shuffled = random.Random(seed).sample(texts, len(texts))
    wanted = held_out * sum(len(text.data) for text in texts)
    taken, count = 0, 0
    while taken < wanted and count < len(shuffled) - 1:
        taken += len(shuffled[count].data)
        count += 1
    return shuffled[count:], shuffled[:count]


def pack(passages: list[bytes]) -> Batch:
    """Each passage of n + 1 bytes gives n tokens and the n bytes that follow them."""
    lengths = [len(passage) - 1 for passage in passages]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    as_bytes = [torch.frombuffer(bytearray(passage), dtype=torch.uint8).long() for passage in passages]
    return Batch(
        tokens=torch.cat([passage[:-1] for passage in as_bytes]),
        targets=torch.cat([passage[1:] for passage in as_bytes]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
    )


class Passages:
    """Draws batches of exactly `total` tokens: passages of 1 to `context` tokens that begin at a line's start."""

    def __init__(self, texts: list[Document], context: int, total: int, seed: int) -> None:
        self.texts, self.context, self.total = texts, context, total
        self.weights = [len(text.data) for text in texts]
        self.random = random.Random(seed)

    def draw(self) -> Batch:
        passages: list[bytes] = []
        room = self.total
        while room > 0:
            data = self.random.choices(self.texts, self.weights)[0].data
            somewhere = self.random.randrange(len(data) - 1)
            start = data.rfind(b"\n", 0, somewhere) + 1
            length = min(self.random.randint(self.context // 8, self.context), room)
            passage = data[start : start + length + 1]
            if len(passage) > 1:
                passages.append(passage)
                room -= len(passage) - 1
        return pack(passages)
