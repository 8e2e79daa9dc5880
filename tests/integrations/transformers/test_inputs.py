"""What models are given, and what their code makes of it: padding anywhere, packed sequences, masks of all pairs,
caches, dropout."""

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from comparison import NAME, assert_close, assert_gradients_close, gradients_of, logits_of
from transformers import DataCollatorWithFlattening, DynamicCache

from flash_attn_jit.integrations import transformers as turing

OLD = transformers.__version__ < "5"
since_5 = pytest.mark.skipif(OLD, reason="since transformers 5")

LENGTHS = (5, 9, 2)


def _three(family: str, **inputs: Any) -> list[torch.Tensor]:
    """Logits here, of eager float32 and of eager float16."""
    results = []
    for implementation, dtype in ((NAME, torch.float16), ("eager", torch.float32), ("eager", torch.float16)):
        model = tiny_models.build(family, implementation, dtype)
        turing.calls.reset()
        with torch.no_grad():
            results.append(logits_of(model(**inputs)))
        if implementation == NAME:
            assert turing.calls.counts == {"flash_attn_jit": tiny_models.FAMILIES[family].layers, "torch": 0}
    return results


@pytest.mark.parametrize("family", ["llama", "mistral, window 8", "gemma2"])
def test_padding_with_holes(family):
    inputs = tiny_models.batch(family, "left")
    inputs["attention_mask"][0, 6:9] = 0
    inputs["attention_mask"][1, -2:] = 0
    shown = inputs["attention_mask"].bool()
    assert_close(*_three(family, **inputs), shown)


def _packed() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(4)
    parts = [torch.randint(3, 99, (1, n)) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return parts, {"input_ids": torch.cat(parts, 1), "position_ids": positions}


def _one_by_one(family: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of packed sequences, and gradients of their sum."""
    model = tiny_models.build(family, "eager", dtype)
    logits = torch.cat([logits_of(model(part)) for part in _packed()[0]], 1)
    _weigh(logits).backward()
    return logits.detach(), gradients_of(model)


def _weigh(logits: torch.Tensor) -> torch.Tensor:
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))).sum()


PACKED_FAMILIES = [pytest.param("llama", marks=pytest.mark.sample), "mistral, window 8", "gemma2", "gpt_oss"]


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_positions(family, use_cache):
    model = tiny_models.build(family, NAME)
    turing.calls.reset()
    logits = logits_of(model(**_packed()[1], use_cache=use_cache))
    _weigh(logits).backward()
    assert turing.calls.counts == {"flash_attn_jit": 2, "torch": 0}
    (exact, exact_gradients), (eager, eager_gradients) = (
        _one_by_one(family, dtype) for dtype in (torch.float32, torch.float16)
    )
    assert_close(logits.detach(), exact, eager)
    assert_gradients_close(gradients_of(model), exact_gradients, eager_gradients)


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_by_the_collator(family):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": part[0].tolist()} for part in _packed()[0]])
    batch.pop("labels")
    model = tiny_models.build(family, NAME)
    turing.calls.reset()
    with torch.no_grad():
        logits = logits_of(model(**batch))
    assert turing.calls.counts == {"flash_attn_jit": 2, "torch": 0}
    (exact, _), (eager, _) = (_one_by_one(family, dtype) for dtype in (torch.float32, torch.float16))
    assert_close(logits, exact, eager)


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_tokens_of_their_own(use_cache):
    """As many sequences as tokens, in rows of a batch too."""
    ids = tiny_models.batch("llama", rows=1)["input_ids"]
    model = tiny_models.build("llama", NAME)
    with torch.no_grad():
        apart = logits_of(model(ids, position_ids=torch.zeros_like(ids), use_cache=use_cache))
        expected = logits_of(model(ids.T))
    assert (apart[0] - expected[:, 0]).abs().max() < 2e-3


def test_packed_rows_of_a_batch():
    model, ids = tiny_models.build("llama", NAME), tiny_models.batch("llama")["input_ids"]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 9, 2), (1, 1, 14))])
    turing.calls.reset()
    with torch.no_grad():
        ours = logits_of(model(ids, position_ids=positions, use_cache=False))
        assert turing.calls.counts == {"flash_attn_jit": 2, "torch": 0}
        for row, lengths in enumerate(((5, 9, 2), (1, 1, 14))):
            parts = [logits_of(model(part[None])) for part in ids[row].split(lengths)]
            assert (ours[row] - torch.cat(parts, 1)[0]).abs().max() < 2e-3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_packed_sequences_are_looked_for_anew(mode):
    """In a tensor that was changed in place since, and in another one."""
    model = tiny_models.build("llama", NAME)
    with mode():
        _, inputs = _packed()
        whole = torch.arange(inputs["input_ids"].shape[1])[None]
        apart = logits_of(model(**inputs))
        together = logits_of(model(inputs["input_ids"], position_ids=whole))
        inputs["position_ids"].copy_(whole)
        again = logits_of(model(**inputs))
    assert torch.equal(again, together)
    assert not torch.allclose(apart, together, atol=0.01)


@pytest.mark.parametrize("family", ["llama", "mistral, window 8"])
def test_a_users_mask_of_all_pairs(family):
    """Says all that there is to say: no causal mask and no window are added."""
    inputs = tiny_models.batch(family)
    length = inputs["input_ids"].shape[1]
    shown = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(6)) < 0.5
    shown |= torch.eye(length, dtype=torch.bool)
    logits = []
    for implementation, dtype in ((NAME, torch.float16), ("eager", torch.float32), ("eager", torch.float16)):
        mask = torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, torch.finfo(dtype).min)
        model = tiny_models.build(family, implementation, dtype)
        with torch.no_grad():
            logits.append(logits_of(model(inputs["input_ids"], attention_mask=mask)))
    assert_close(*logits)
    with torch.no_grad():
        of_bool = logits_of(tiny_models.build(family, NAME)(inputs["input_ids"], attention_mask=shown))
    assert_close(of_bool, *logits[1:])


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_prompt_in_pieces(family, padding):
    """Several queries at a time behind a cache."""
    inputs = tiny_models.batch(family, padding)
    ids, shown = inputs["input_ids"], inputs.get("attention_mask")
    results = []
    for implementation, dtype in ((NAME, torch.float16), ("eager", torch.float32), ("eager", torch.float16)):
        model = tiny_models.build(family, implementation, dtype)
        cache: Any = DynamicCache(config=model.config)
        pieces = []
        for begin, end in ((0, 7), (7, 12), (12, 16)):
            seen = None if shown is None else shown[:, :end]
            options = {"past_key_values" if OLD else "cache": cache, "attention_mask": seen}
            with torch.no_grad():
                pieces.append(logits_of(model(ids[:, begin:end], **options)))
        results.append(torch.cat(pieces, 1))
    assert_close(*results, slice(None) if shown is None else shown.bool())


def test_dropout_follows_torchs_seed():
    model = tiny_models.build("gpt2", NAME, dropout=0.5).train()
    inputs = tiny_models.batch("gpt2")

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return logits_of(model(**inputs, use_cache=False))

    turing.calls.reset()
    first, again, other = run(7), run(7), run(8)
    assert turing.calls.counts == {"flash_attn_jit": 6, "torch": 0}
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    undisturbed = logits_of(model.eval()(**inputs, use_cache=False))
    assert (first - undisturbed).abs().max() > 0.05


@pytest.mark.parametrize("padding", [None, "left"])
def test_dropout_with_checkpoints(padding):
    """What is recomputed drops the same pairs: gradients are those of a pass without checkpoints."""

    def gradients(checkpointing: bool) -> torch.Tensor:
        model = tiny_models.build("gpt2", NAME, dropout=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(9)
        _weigh(logits_of(model(**tiny_models.batch("gpt2", padding), use_cache=False))).backward()
        return gradients_of(model)

    assert torch.equal(gradients(True), gradients(False))


@since_5
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.sample), "gemma3", "gpt_oss"])
def test_continuous_batching(family):
    prompts = [part[0].tolist() for part in _packed()[0]]
    eager = tiny_models.build(family, "eager", torch.float32)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = [eager.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]

    model = tiny_models.build(family, NAME)
    turing.calls.reset()
    results = model.generate_batch(
        prompts,
        generation_config=transformers.GenerationConfig(**options, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64),
        progress_bar=False,
    )
    assert [results[request].generated_tokens for request in sorted(results)] == expected
    assert turing.calls.counts == {"flash_attn_jit": 8, "torch": 0}
    assert model.config._attn_implementation == NAME
