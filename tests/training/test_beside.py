"""Beside others' tools: the Trainer of transformers, LoRA of peft, pruning of our own, and state_dicts on disk."""

import warnings

import pytest
import torch
from torch import nn

import s3lab as s3

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TABLE = {"lm_head": "dense", "*.mlp.*": "2:4", "*": "50%/row"}


def language_model():
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2))


def sentences():
    ids = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(folder, method, resume=False):
    model = language_model()
    sparsity = s3.sparse(model, TABLE, method)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=sentences(), callbacks=[sparsity.callback()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainer, about its own arguments
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return model, sparsity


@pytest.mark.parametrize("method", [s3.SRSTE(), s3.RigL(steps=8, every=1), s3.Proximal(1.0, adaptive=True)])
def test_the_trainer_takes_the_steps_and_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, method):
    model, sparsity = train(tmp_path, method)
    assert sparsity.steps == 4
    sparsity.check()
    again, resumed = train(tmp_path, method, resume=True)
    assert resumed.steps == 4
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_lora_of_peft_is_trained_beside_fixed_zeros():
    peft = pytest.importorskip("peft", reason="peft is not installed: LoRA beside a pattern is not tried")
    model = language_model()
    sparsity = s3.sparse(model, TABLE, s3.Fixed())
    before = {name: mask.clone() for name, mask in sparsity.masks.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about transformers
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["gate_proj", "q_proj"]))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    sparsity.follow(optimizer)
    ids = torch.stack([row["input_ids"] for row in sentences()])
    first, *_, last = (_step(adapted, optimizer, ids) for _ in range(4))
    assert last < first
    sparsity.check()
    assert all(torch.equal(before[name], mask) for name, mask in sparsity.masks.items())
    s3.densify(adapted)
    assert _step(adapted, optimizer, ids) < first


def test_lora_that_keeps_all_is_that_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed: its LoRA is not compared")
    ours, theirs, X = nn.Linear(16, 8), nn.Linear(16, 8), torch.randn(32, 16)
    theirs.load_state_dict(ours.state_dict())
    s3.sparse(ours, "4:4", s3.LoRA(rank=2, scale=2.0))
    other = peft.get_peft_model(nn.Sequential(theirs), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    lora, own = other.base_model.model[0], ours.parametrizations.weight[0]
    lora.lora_A["default"].weight.data.copy_(own.A)
    ours.bias.requires_grad_(False)
    for model in (ours, other):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (model(X) - X[:, :8]).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(X), other(X))
    torch.testing.assert_close(s3.densify(ours).weight, other.merge_and_unload()[0].weight, check_device=False)


def _step(model, optimizer, ids):
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def test_what_was_pruned_is_tuned_under_the_mask_that_pruning_found():
    layer = nn.Linear(16, 8)
    X = torch.randn(64, 16)
    solution = s3.prune(layer.weight.detach(), "2:4", s3.hessian(X), "sparsegpt")
    layer.weight.data.copy_(solution.weight)
    for method in ("fixed", "spp", "lora"):
        sparsity = s3.sparse(layer, "2:4", method)
        assert torch.equal(sparsity.masks[""], solution.mask) and torch.equal(layer.weight, solution.weight)
        s3.densify(layer)


def test_the_weight_stays_the_parameter_that_it_was():
    layer = nn.Linear(16, 8)
    weight, optimizer = layer.weight, torch.optim.SGD(layer.parameters(), lr=0.1)
    sparsity = s3.sparse(layer, "2:4", "ste")
    sparsity.follow(optimizer)
    layer(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
    assert layer.parametrizations.weight.original is weight
    assert s3.densify(layer).weight is weight and weight.count_nonzero() == 64


def test_what_a_dense_state_lacks_is_told_and_a_sparse_one_is_plain_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    layer = nn.Linear(16, 8)
    s3.sparse(layer, "2:4", "srste")
    save_file(layer.state_dict(), tmp_path / "state.safetensors")
    other = nn.Linear(16, 8)
    s3.sparse(other, "2:4", "srste")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(layer.weight, other.weight)
    with pytest.raises(RuntimeError, match="parametrizations"):
        other.load_state_dict(nn.Linear(16, 8).state_dict())
