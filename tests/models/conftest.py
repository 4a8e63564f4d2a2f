"""Tiny random models of ten families, and sequences to calibrate them on."""

import pytest
import torch

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4}
_SPECIAL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}
_SMALL = _SIZES | _SPECIAL
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
FAMILIES = {
    "Qwen3": {**_GROUPED, "head_dim": 8},
    "Qwen2": _GROUPED,
    "Llama": _GROUPED,
    "Mistral": {**_GROUPED, "sliding_window": 8},
    "Gemma": {**_GROUPED, "head_dim": 8},
    "OPT": _SPECIAL
    | {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "Qwen3Moe": {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "GPTNeoX": _SMALL,
    "Phi": _GROUPED,
}


@pytest.fixture(scope="session")
def make_tiny():
    """A function from the name of a family, with options of its config, to a random model, always the same."""
    transformers = pytest.importorskip("transformers")

    def make(family, **options):
        config = getattr(transformers, f"{family}Config")(**FAMILIES[family] | options)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # as drawn, every matrix is far too small to matter
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def ids():
    """Twelve sequences of sixteen tokens."""
    return torch.randint(3, 64, (12, 16), generator=torch.Generator().manual_seed(1))


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(FAMILIES))


@pytest.fixture
def spread():
    """A function that makes some channels of every norm of a model large, as those of language models are."""

    def scale(model):
        generator = torch.Generator().manual_seed(3)
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 1:
                weight.data *= torch.exp(torch.randn(weight.shape, generator=generator))
        return model

    return scale
