"""A whole model, a Llama-like decoder, with PyTorch's own attention and with this library in its place."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import route_sdpa
from . import timing
from .backends import SDPA_EFFICIENT, SDPA_MATH
from .out_of_memory import OUT_OF_MEMORY, free_memory, is_out_of_memory

SDPA, ROUTED = NAMES = ("sdpa", "route_sdpa")
FORWARD, TRAINING = STEPS = ("forward", "training")

# The backends that a GPU without the instructions of the others has, in PyTorch's order of choice.
_TURINGS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_ROPE_BASE = 10000.0
_EPS = 1e-5
_INITIAL_STD = 0.02
# Gradients of a mean over thousands of tokens are small for float16; AdamW's step does not depend on their scale.
_LOSS_SCALE = 1024.0
_LEARNING_RATE = 1e-4
_ADAM_EPS = 1e-4  # one that float16's states can hold


@dataclass(frozen=True)
class Shape:
    """The model's, and how many tokens a step takes in all its sequences together."""

    layers: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tokens: int

    @property
    def hidden(self) -> int:
        return self.num_heads * self.head_dim

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.num_heads} query and {self.num_heads_k} key heads of {self.head_dim}, hidden "
            f"{self.hidden}, SwiGLU {self.intermediate}, vocabulary {self.vocabulary}, float16, {self.tokens} tokens"
        )


class Rotary(NamedTuple):
    """Cosines and sines, (seqlen, head_dim), of the angles by which positions turn queries and keys."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, seqlen: int, head_dim: int, device: str) -> "Rotary":
        pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
        angles = torch.outer(torch.arange(seqlen, device=device), _ROPE_BASE ** (-pairs / head_dim))
        angles = torch.cat((angles, angles), -1)
        return cls(angles.cos().half(), angles.sin().half())

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self._head_dim = shape.head_dim
        self.q = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k = nn.Linear(shape.hidden, shape.num_heads_k * shape.head_dim, bias=False)
        self.v = nn.Linear(shape.hidden, shape.num_heads_k * shape.head_dim, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self._head_dim)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        # As Hugging Face's models call it: grouped heads are SDPA's own business.
        attended = F.scaled_dot_product_attention(rotary.turn(q), rotary.turn(k), v, is_causal=True, enable_gqa=True)
        return cast(torch.Tensor, self.out(attended.transpose(1, 2).flatten(-2)))


class SwiGlu(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.down(F.silu(self.gate(x)) * self.up(x)))


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(shape.hidden, _EPS) for _ in range(2))
        self.attention, self.mlp = Attention(shape), SwiGlu(shape)

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return cast(torch.Tensor, x + self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """Tokens (batch, seqlen) to the logits of each one's successor, (batch, seqlen, vocabulary). float16 weights from
    N(0, 0.02^2), the same for the same seed."""

    def __init__(self, shape: Shape, device: str, seed: int = 0):
        super().__init__()
        self._head_dim = shape.head_dim
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, _EPS)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        self.to(device, torch.float16)
        generator = torch.Generator(device).manual_seed(seed)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=_INITIAL_STD, generator=generator)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rotary = Rotary.of(tokens.shape[1], self._head_dim, str(tokens.device))
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, rotary)
        return cast(torch.Tensor, self.head(self.norm(x)))


class Workload:
    """The two steps that are timed, over the same model and the same random tokens for every candidate."""

    def __init__(self, shape: Shape, seqlen: int, device: str):
        self.model = Decoder(shape, device)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=_LEARNING_RATE, eps=_ADAM_EPS)
        generator = torch.Generator(device).manual_seed(1)
        tokens = (shape.tokens // seqlen, seqlen + 1)
        self._tokens = torch.randint(shape.vocabulary, tokens, generator=generator, device=device)

    def forward(self) -> torch.Tensor:
        """The logits of every token, without a graph."""
        with torch.no_grad():
            return cast(torch.Tensor, self.model(self._tokens[:, :-1]))

    def training(self) -> torch.Tensor:
        """Forward, cross-entropy in float32, backward and AdamW's step; gradients are freed and made anew."""
        self._optimizer.zero_grad(set_to_none=True)
        logits = self.model(self._tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), self._tokens[:, 1:].flatten())
        (loss * _LOSS_SCALE).backward()
        self._optimizer.step()
        return loss.detach()

    def drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, name: str) -> Callable[[], torch.Tensor]:
        return {FORWARD: self.forward, TRAINING: self.training}[name]


def _selected(name: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(_TURINGS) if name == SDPA else route_sdpa()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def sdpa_backend(shape: Shape) -> str:
    """Which of the two PyTorch runs such heads on: the memory-efficient kernel where its version of it takes them."""
    q = torch.zeros(1, shape.num_heads, 8, shape.head_dim, dtype=torch.float16, device=_device())
    k = q[:, : shape.num_heads_k].clone()
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            warnings.simplefilter("ignore")
            F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    except RuntimeError:
        return SDPA_MATH
    return SDPA_EFFICIENT


def why_not_routed(shape: Shape, workload: Workload, step: str) -> str:
    """Empty where route_sdpa() takes every call of the step: a time is no use where it takes some."""
    with route_sdpa() as router:
        workload.step(step)()
    if router.counts == {"flash_attn_jit": shape.layers, "torch": 0}:
        return ""
    return "; ".join(router.reasons) or f"route_sdpa() saw {router.counts}, and the model has {shape.layers} calls"


def _peak_bytes(call: Callable[[], object]) -> int | None:
    """Of the GPU's memory in a call, the model's weights and all else included."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _first_calls(shape: Shape, workload: Workload, name: str, step: str) -> tuple[str, int | None]:
    """Why the candidate cannot be timed, or nothing, and its peak memory. Kernels are compiled here."""
    reason, peak = "", None
    try:
        if name == ROUTED:
            reason = why_not_routed(shape, workload, step)
        if not reason:
            with _selected(name):
                workload.step(step)()
                peak = _peak_bytes(workload.step(step))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = OUT_OF_MEMORY
    if reason:
        workload.drop_gradients()
        free_memory()
    return reason, peak


def _run_step(shape: Shape, workload: Workload, step: str, rounds: int, burst_ms: float) -> list[dict[str, Any]]:
    first = {name: _first_calls(shape, workload, name, step) for name in NAMES}
    running = [
        timing.Candidate(name, partial(_selected, name), [workload.step(step)]) for name in NAMES if not first[name][0]
    ]
    samples = timing.time_interleaved(running, rounds, burst_ms)
    rows: list[dict[str, Any]] = []
    for name, (reason, peak) in first.items():
        if reason or name not in samples:
            rows.append({"backend": name, "skipped": reason or OUT_OF_MEMORY})
        else:
            rows.append({"backend": name, **timing.summary(samples[name]), "peak_bytes": peak})
    theirs, ours = (row.get("ms_median") for row in rows)
    if theirs and ours:
        rows[NAMES.index(ROUTED)]["times_faster"] = theirs / ours
    return rows


def run(shape: Shape, seqlens: Sequence[int], rounds: int, burst_ms: float) -> Iterator[dict[str, Any]]:
    """A row for each sequence length, step and candidate. Every length has a model of its own, the same one."""
    backend = sdpa_backend(shape)
    for seqlen in seqlens:
        workload = Workload(shape, seqlen, _device())
        of_length = {**asdict(shape), "seqlen": seqlen, "batch": shape.tokens // seqlen, "causal": True}
        for step in STEPS:
            for row in _run_step(shape, workload, step, rounds, burst_ms):
                yield {**of_length, "pass": step, "sdpa_backend": backend, **row}
        del workload
        free_memory()
