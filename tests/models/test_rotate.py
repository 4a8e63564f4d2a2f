"""Rotated models: the dense model says what it said, and importance gathers where the rotation is learned."""

from math import log

import pytest
import torch

from s3lab.errors import DataError
from s3lab.models.basis.orthogonal import Reads, Writes, entropy, hadamard, learn
from s3lab.models.basis.rotate import rotate

ROTATED = ["Qwen3", "Qwen2", "Llama", "Mistral", "Gemma", "Qwen3Moe"]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12, 64, 80, 576, 896])
def test_a_hadamard_matrix_of_any_size_is_orthogonal_and_flat(n):
    Q = hadamard(n)
    torch.testing.assert_close(Q.T @ Q, torch.eye(n, dtype=torch.float64))
    odd = n // (n & -n)
    assert float(Q.abs().max()) <= (2 if odd > 1 else 1) ** 0.5 / n**0.5 + 1e-12
    assert not torch.equal(Q, hadamard(n, seed=1)) or n < 4


@pytest.mark.parametrize("kind", ["hadamard", "learned"])
@pytest.mark.parametrize("name", ROTATED)
def test_the_dense_model_says_what_it_said(make_tiny, ids, name, kind, spread):
    model = spread(make_tiny(name)).train()
    before = logits(model.eval(), ids)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    done = rotate(model.train(), kind, ids, steps=20)
    assert model.training
    apart = (logits(model.eval(), ids) - before).norm() / before.norm()
    assert apart < 1e-4
    assert (done.width, done.layers, done.heads) == (32, 2, 2)
    changed = {n for n, p in model.named_parameters() if n in weights and not torch.equal(p, weights[n])}
    assert changed >= {n for n in weights if n.endswith(("v_proj.weight", "o_proj.weight", "embed_tokens.weight"))}
    assert not any("q_norm" in n or "k_norm" in n for n in changed)


@pytest.mark.parametrize("name", ["OPT", "GPT2", "GPTNeoX", "Phi"])
def test_other_norms_are_refused_and_the_model_stays(make_tiny, ids, name):
    model = make_tiny(name)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(DataError, match="is a LayerNorm, no RMS norm"):
        rotate(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_norm_after_a_writer_is_refused(ids):
    """Its output goes into the stream, where its weight cannot be folded."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
    with pytest.raises(DataError, match=r"post_\w+_layernorm is read by no matrix"):
        rotate(model)


def test_a_model_that_reads_the_stream_unseen_is_given_back(make_tiny, ids):
    model = make_tiny("Llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * torch.arange(32))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(DataError, match="gives other logits once it is rotated, and is as it was"):
        rotate(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_tied_head_is_untied_and_stays_so_when_saved(make_tiny, ids, tmp_path, spread):
    from transformers import AutoModelForCausalLM

    model = spread(make_tiny("Llama", tie_word_embeddings=True))
    before = logits(model, ids)
    assert rotate(model).untied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(again, ids) - before).norm() / before.norm() < 1e-4


def test_a_rotation_by_hand_gives_the_stream_of_the_rotated_model(make_tiny, ids, spread):
    plain, model = spread(make_tiny("Llama")), spread(make_tiny("Llama"))
    rotate(model, seed=4)
    streams = [
        m(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1].detach() for m in (plain, model)
    ]
    torch.testing.assert_close(streams[0] @ hadamard(32, 4).float(), streams[1], rtol=1e-4, atol=1e-4)
    assert all((layer.input_layernorm.weight == 1).all() for layer in model.model.layers)


def test_half_precision_changes_by_rounding(make_tiny, ids):
    model = make_tiny("Qwen3").to(torch.bfloat16)
    before = logits(model, ids).float()
    rotate(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (logits(model, ids).float() - before).norm() / before.norm() < 8 * torch.finfo(torch.bfloat16).eps


def test_importance_is_that_of_the_rotated_weights_and_inputs():
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(5, 8, generator=generator), torch.randn(40, 8, generator=generator)
    Q = hadamard(8).float()
    found = Reads(W, X.T @ X / 40).weigh(Q)
    torch.testing.assert_close(found, (W @ Q) ** 2 * (X @ Q).square().mean(0))
    made = Writes(W.T, torch.arange(5.0)).weigh(Q)
    torch.testing.assert_close(made, (Q.T @ W.T) ** 2 * torch.arange(5.0))


def test_entropy_is_least_for_one_weight_and_most_for_equal_ones():
    one = torch.zeros(4, 8)
    one[1, 2] = 3
    same, flat = torch.eye(8), Reads(torch.ones(4, 8), torch.eye(8))
    assert float(entropy(same, [Reads(one, torch.eye(8))])) == pytest.approx(0, abs=1e-6)
    assert float(entropy(same, [flat])) == pytest.approx(log(32), rel=1e-6)


def test_weights_and_inputs_of_zeros_are_learned_around():
    W = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    W[:3] = 0
    Q, before, after = learn((4, 4), [[Reads(W, torch.diag(torch.tensor([1.0, 2, 0, 0])))]], steps=50)
    assert Q.isfinite().all() and after < before
    nothing = [Reads(torch.zeros(8, 4), torch.eye(4))]
    assert torch.equal(learn((4, 4), [nothing], steps=2)[0], torch.eye(4).double())


def test_learning_undoes_a_rotation_that_spread_importance():
    """Sparse weights, rotated: what is learned gathers them better than where it began."""
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(64, 8, generator=generator) * (torch.rand(64, 8, generator=generator) < 0.2)
    term = Reads(sparse @ hadamard(8).float(), torch.eye(8))
    Q, before, after = learn((8, 8), [[term]], steps=300)
    torch.testing.assert_close(Q.T @ Q, torch.eye(8, dtype=torch.float64))
    assert float(entropy(Q.float(), [term])) == pytest.approx(after, rel=1e-4)
    gap = before - float(entropy(torch.eye(8), [Reads(sparse, torch.eye(8))]))
    assert gap > 0 and before - after > 0.5 * gap


def test_each_head_is_learned_on_its_own():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 1, 16, 4, generator=generator)
    H = torch.eye(4).expand(3, 1, 4, 4)
    Q, before, after = learn((3, 1, 4, 4), [[Reads(W, H)]], steps=50)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(4, dtype=torch.float64).expand(3, 1, 4, 4))
    assert after < before and not torch.equal(Q[0], Q[1])
