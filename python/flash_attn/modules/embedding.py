"""Embeddings of tokens, positions and token types; also split over the processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_attn._errors import InvalidArgument, NotServed
from flash_attn.utils.distributed import all_reduce, reduce_scatter

__all__ = [
    "BertEmbeddings",
    "ColumnParallelEmbedding",
    "GPT2Embeddings",
    "ParallelGPT2Embeddings",
    "VocabParallelEmbedding",
]


def _positions(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids


class GPT2Embeddings(nn.Module):
    """Tokens and positions; max_position_embeddings <= 0: tokens alone.

    word_embed_proj_dim: tokens have that many features, and a projection to embed_dim.
    """

    def __init__(
        self,
        embed_dim,
        vocab_size,
        max_position_embeddings,
        padding_idx=None,
        word_embed_proj_dim=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        if word_embed_proj_dim is None:
            self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx, **kind)
            self.project_in = None
        else:
            self.word_embeddings = nn.Embedding(vocab_size, word_embed_proj_dim, padding_idx=padding_idx, **kind)
            self.project_in = nn.Linear(word_embed_proj_dim, embed_dim, bias=False, **kind)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **kind)

    def forward(self, input_ids, position_ids=None):
        """input_ids, position_ids (batch, seqlen) -> (batch, seqlen, embed_dim)."""
        embeddings = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        return embeddings


class BertEmbeddings(nn.Module):
    """Tokens, positions (unless max_position_embeddings <= 0) and types (unless type_vocab_size <= 0)."""

    def __init__(
        self,
        embed_dim,
        vocab_size,
        max_position_embeddings,
        type_vocab_size,
        padding_idx=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx, **kind)
        self.max_position_embeddings, self.type_vocab_size = max_position_embeddings, type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **kind)
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, embed_dim, **kind)

    def forward(self, input_ids, position_ids=None, token_type_ids=None):
        """input_ids, position_ids, token_type_ids (batch, seqlen) -> (batch, seqlen, embed_dim). Default type: 0."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        if self.type_vocab_size > 0:
            types = input_ids.new_zeros(input_ids.shape[1]) if token_type_ids is None else token_type_ids
            embeddings = embeddings + self.token_type_embeddings(types)
        return embeddings


def _world_size(process_group, name: str, n: int) -> int:
    world_size = 1 if process_group is None else dist.get_world_size(process_group)
    if n % world_size:
        raise InvalidArgument(f"{name}: expected a multiple of {world_size}, the world size, got {n}")
    return world_size


class VocabParallelEmbedding(nn.Embedding):
    """This process's rows of the table. Tokens of other processes give 0: the results are yet to be summed."""

    def __init__(self, num_embeddings, *args, process_group=None, padding_idx=None, **kwargs):
        world_size = _world_size(process_group, "num_embeddings", num_embeddings)
        if world_size > 1 and padding_idx is not None:
            raise NotServed("padding_idx: not in a table that is split; expected None")
        super().__init__(num_embeddings // world_size, *args, padding_idx=padding_idx, **kwargs)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        if self.process_group is None:
            return super().forward(input)
        mine = input - dist.get_rank(self.process_group) * self.num_embeddings
        others = (mine < 0) | (mine >= self.num_embeddings)
        return super().forward(mine.masked_fill(others, 0)).masked_fill(others[..., None], 0.0)


class ColumnParallelEmbedding(nn.Embedding):
    """This process's columns of the table."""

    def __init__(self, num_embeddings, embedding_dim, *args, process_group=None, **kwargs):
        world_size = _world_size(process_group, "embedding_dim", embedding_dim)
        super().__init__(num_embeddings, embedding_dim // world_size, *args, **kwargs)
        self.process_group = process_group


class ParallelGPT2Embeddings(nn.Module):
    """GPT2Embeddings: tokens split by rows, positions by columns.

    sequence_parallel: the result is this process's part of the first dimension; else all of it.
    """

    def __init__(
        self,
        embed_dim,
        vocab_size,
        max_position_embeddings,
        process_group,
        padding_idx=None,
        sequence_parallel=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kind = {"process_group": process_group, "device": device, "dtype": dtype}
        self.process_group, self.sequence_parallel = process_group, sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(vocab_size, embed_dim, padding_idx=padding_idx, **kind)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(max_position_embeddings, embed_dim, **kind)

    def forward(self, input_ids, position_ids=None, combine_batch_seqlen_dim=False):
        """input_ids, position_ids (batch, seqlen) -> (batch, seqlen, embed_dim), or with combine_batch_seqlen_dim
        (batch * seqlen, embed_dim); of that, with sequence_parallel, this process's part."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            columns = self.position_embeddings(_positions(input_ids, position_ids))
            before = dist.get_rank(self.process_group) * columns.shape[-1]
            after = embeddings.shape[-1] - before - columns.shape[-1]
            embeddings = embeddings + nn.functional.pad(columns, (before, after))
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        return (reduce_scatter if self.sequence_parallel else all_reduce)(embeddings, self.process_group)
