"""Known bugs of LoRA implementations, each with its place of report, and that lora_lab does not have it.

The number in a test's name is the bug's number; the docstring starts with the link. What has no test here, and why:
 3  merged q-k-v layers (microsoft/LoRA#103, #105, #107; litgpt#629, #1224): there is none here, one layer is one matrix
14  roles of A and B for embeddings (microsoft/LoRA#121, #155; peft#1060): only nn.Linear can be adapted
21  slower than full fine-tuning on small models (peft#925, #960, #664, #2063; minimind#88): see benchmarks/
26  no_grad misunderstood (microsoft/LoRA#185): nothing to test beyond 12
Of 16, Conv1D itself is refused (its transposed weight); what it teaches about test shapes is tested.
"""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lab.lora import (
    AdapterError,
    LoRALinear,
    disabled,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    save_adapter,
)
from lora_lab.models import count_parameters

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(dtype=torch.float32, bias=True) -> nn.Sequential:
    """Three layers: wide to narrow, square, narrow to wide."""
    return nn.Sequential(*(nn.Linear(i, o, bias, dtype=dtype) for i, o in ((12, 8), (8, 8), (8, 20))))


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(torch.randn_like(p) * 0.3 / math.sqrt(p.shape[1]))
    return model


def adapted(dtype=torch.float32, **settings) -> nn.Sequential:
    model = small(dtype)
    inject(model, "all-linear", **{"r": 3, "alpha": 5, **settings})
    return trained(model)


def values(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_bug_01_eval_does_not_merge():
    """microsoft/LoRA#34, #61; lit-llama PR#185: eval() never merged, then merged in place and saved W + s B A."""
    model, x = adapted(), torch.randn(4, 12)
    before, output = values(model), model.train()(x)
    assert model.eval() is model and same(values(model), before) and torch.equal(model(x), output)
    for _ in range(100):
        model.train()
        model.eval()
    assert same(values(model), before)
    model(x).sum().backward()
    assert all(p.grad is not None for p in lora_parameters(model)), "gradients in eval mode too"


def test_bug_01_loading_weights_in_eval_mode_counts_the_update_once():
    """microsoft/LoRA#34: a checkpoint made or loaded in eval mode had the update twice, or lost it."""
    model, twin, x = adapted().eval(), adapted(), torch.randn(4, 12)
    twin.eval().load_state_dict(model.state_dict())
    for mode in (False, True, False):
        assert torch.equal(twin.train(mode)(x), model(x))


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "pissa"])
def test_bug_02_pretrained_weights_are_kept(init):
    """microsoft/LoRA#55: replacing a layer drew its pretrained weight anew."""
    model, x = small(), torch.randn(4, 12)
    tensors, before, output = dict(model.named_parameters()), values(model), model(x)
    inject(model, "all-linear", r=3, alpha=5, init=init)
    after = dict(model.named_parameters())
    assert all(after[name] is tensor and torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_bug_04_merged_equals_unmerged(dtype, bias):
    """peft#1388, #1836, #1035, #2502; torchtune#1101; unsloth#3091; transformers#31293.

    What may differ: base, update and their sum are rounded to the dtype here, weight and output there, each time by
    half an eps; and the sums have their own rounding, in at least float32, for each of their terms."""
    layer = trained(LoRALinear(nn.Linear(64, 48, bias, dtype=dtype), 4, 8))
    x, wide = torch.randn(16, 64, dtype=dtype), torch.promote_types(dtype, torch.float32)
    size = layer.weight.double().abs() + 2 * layer.lora_B.double().abs() @ layer.lora_A.double().abs()
    size = x.double().abs() @ size.T + (layer.bias.double().abs() if bias else 0)
    allowed = (5 / 2 * torch.finfo(dtype).eps + (64 + 2 * 4 + 4) * torch.finfo(wide).eps) * size
    difference = (merge(layer)(x).double() - layer(x).double()).abs()
    assert (difference <= allowed).all()
    if dtype == torch.float32:
        assert difference.max() <= 1e-5


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bug_04_the_merged_weight_is_the_best_possible_rounding(dtype, cast):
    """peft, safe_merge: the update was rounded to the dtype of the base first, and the sum a second time."""
    layer = trained(LoRALinear(nn.Linear(64, 48, dtype=dtype), 4, 8))
    layer.to(dtype if cast else None)  # cast: A and B in 16 bits too
    exact = layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    error = (merge(layer).weight.double() - exact).abs()
    wide_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    half_a_step = torch.finfo(dtype).eps / 2 * exact.abs() * 1.0001
    assert (error <= half_a_step + 8 * wide_eps * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bug_05_merging_does_not_drift(dtype):
    """LyCORIS#264, #267: merge and unmerge, again and again, moved the base."""
    model = adapted(dtype)
    before, first = values(model), values(merge(model))
    for _ in range(20):
        again = merge(model)
    assert same(values(model), before) and same(values(again), first)


def test_bug_06_merging_twice_is_merging_once():
    """peft's test_merge_layers_is_idempotent: a second merge must not add the update again."""
    model = adapted()
    once = merge(model)
    assert same(values(merge(once)), values(once)) and {type(m) for m in merge(once)} == {nn.Linear}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_bug_07_a_diverged_adapter_is_not_merged(half, value):
    """peft#3682, #3689, #3705: NaN was merged without a word, or the base was changed before the error."""
    model = adapted()
    with torch.no_grad():
        getattr(model[1], half)[0, 0] = value
    before = values(model)
    with pytest.raises(ValueError, match="layer '1' holds NaN or Inf"):
        merge(model)
    assert all(torch.equal(a.nan_to_num(), before[n].nan_to_num()) for n, a in model.state_dict().items())
    assert all(type(m) is LoRALinear for m in model)


def test_bug_08_merging_a_tied_head_leaves_the_embedding():
    """peft#2018; transformers#45127; tinker-cookbook PR#593: the merge of lm_head went into the embedding too."""
    model = nn.ModuleDict({"emb": nn.Embedding(9, 6), "lm_head": nn.Linear(6, 9, bias=False)})
    model["lm_head"].weight = model["emb"].weight
    inject(model, "lm_head", r=2, alpha=4)
    trained(model)
    tokens, before = torch.arange(9), model["emb"].weight.clone()
    merged = merge(model)
    assert torch.equal(merged["emb"](tokens), before) and torch.equal(model["emb"].weight, before)
    assert model["lm_head"].weight is model["emb"].weight
    torch.testing.assert_close(merged["lm_head"](merged["emb"](tokens)), model["lm_head"](model["emb"](tokens)))


@pytest.mark.parametrize("targets", [["0", "nope"], "nope", ["0", "1", "2", "3"]])
def test_bug_09_a_name_that_fits_nothing_is_an_error(targets):
    """peft#3658; SimpleTuner#766: a target that matched nothing was passed over without a warning."""
    model = small()
    with pytest.raises(ValueError, match="'(nope|3)' fits no layer of the model. Linear layers here: '0', '1', '2'"):
        inject(model, targets, r=2, alpha=4)
    assert {type(m) for m in model} == {nn.Linear} and all(p.requires_grad for p in model.parameters())


def test_bug_10_a_name_is_a_path_or_its_end_at_a_dot():
    """peft#2964, #690, #3755; unsloth-zoo PR#807: "fc1" also matched "xfc1", or a part in the middle."""
    names = ["fc1", "xfc1", "fc10", "fc1_x"]
    model, block = (nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2))
    model["block"], model["deep"] = block, nn.ModuleDict({"fc1": nn.ModuleDict({"out": nn.Linear(4, 4)})})
    assert inject(model, ["fc1"], r=2, alpha=4) == ["fc1", "block.fc1"]
    assert type(model["deep"]["fc1"]["out"]) is nn.Linear


def test_bug_11_only_A_and_B_are_trained():
    """minLoRA#2; peft#2738; microsoft/aurora#167; diffusers PR#2245: the base, or its bias, was left to train."""
    model = small()
    model.append(nn.LayerNorm(20))
    before = values(model)
    inject(model, ["0", "2"], r=3, alpha=5)
    names = {f"{i}.lora_{k}" for i in (0, 2) for k in "AB"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    optimizer, start = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), values(model)
    for _ in range(5):
        model(torch.randn(4, 12)).square().sum().backward()
        assert all((p.grad is None) == (n not in names) for n, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
    after = values(model)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert all(not torch.equal(after[n], start[n]) for n in names)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "svd"])
@pytest.mark.parametrize("rslora", [False, True])
def test_bug_12_gradients_flow_through_the_frozen_layers(init, rslora):
    """lora-pytorch 0.2.0 runs the base without gradients: the output is right, gradients of earlier layers are not.

    The reference is the dense model with weights W + s B A (- s B0 A0 for pissa), differentiated by autograd."""
    model = adapted(torch.float64, init=init, rslora=rslora)
    x = torch.randn(4, 12, dtype=torch.float64)
    model(xa := x.clone().requires_grad_()).tanh().sum().backward()
    xb, leaves = x.clone().requires_grad_(), []
    h = xb
    for layer in model:
        A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        delta = B @ A - (layer.start_B @ layer.start_A if init == "pissa" else 0)
        h = F.linear(h, layer.weight + 5 / (math.sqrt(3) if rslora else 3) * delta, layer.bias)
        leaves += [(layer.lora_A, A), (layer.lora_B, B)]
    h.tanh().sum().backward()
    torch.testing.assert_close(xa.grad, xb.grad, rtol=1e-12, atol=1e-13)
    for mine, reference in leaves:
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bug_13_one_of_A_and_B_starts_at_zero_and_not_both(init, device):
    """cosmos-predict2.5 PR#15; FastVideo PR#781; lit-llama PR#117: both zero cannot learn, B random is not the base."""
    layer = LoRALinear(nn.Linear(6, 4, device=device), r=2, alpha=4, init=init)
    if device == "meta":
        assert layer.lora_A.is_meta and layer.lora_B.is_meta
        return
    assert not layer.lora_B.any() and layer.lora_A.all()
    layer(torch.randn(3, 6)).square().sum().backward()
    assert not layer.lora_A.grad.any() and layer.lora_B.grad.all()
    torch.optim.SGD(lora_parameters(layer), 0.1).step()
    assert layer.lora_B.all()


def test_bug_13_weights_drawn_anew_for_all_submodules_leave_A_and_B():
    """cosmos-predict2.5 PR#15: model.apply(init) took A and B for layers of their own, and B was not zero any more."""
    model = adapted()
    before = [p.clone() for p in lora_parameters(model)]
    model.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Linear) else None)
    assert all(m.weight.eq(1).all() for m in model)
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(model), before, strict=True))


def test_bug_15_dropout_acts_on_the_input_of_A_alone():
    """peft#2066, #1673; AiDotNet PR#256; aprender PR#2170: at the wrong place, not scaled, or not connected."""
    layer = trained(LoRALinear(nn.Linear(8, 5, dtype=torch.float64), 2, 6, dropout=0.5))
    x = torch.randn(8, dtype=torch.float64)
    base = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x), base + layer.delta_weight() @ x, rtol=0, atol=1e-13)
    layer.train()
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 2.0], dtype=torch.float64)] * 8)  # all 256; 2 = 1/(1-p)
    possible = base + (masks * x) @ layer.delta_weight().T
    torch.testing.assert_close(possible.mean(0), layer.eval()(x), rtol=0, atol=1e-12)  # the mean over masks is eval
    outputs = layer.train()(x.expand(64, 8))
    distances = (outputs[:, None] - possible).abs().amax(-1).min(1)  # to the nearest of the possible ones
    assert (distances.values < 1e-12).all() and len(distances.indices.unique()) > 40
    with disabled(layer):
        assert torch.equal(layer(x), base), "the base's path has no dropout"


@pytest.mark.parametrize(("in_features", "out_features"), [(6, 6), (7, 3), (3, 7), (5, 1), (1, 5)])
def test_bug_16_square_and_other_shapes_with_a_trained_B(in_features, out_features):
    """peft#324, #3531, #3532: a transposed update goes unseen in a square layer, with one output, or if B = 0."""
    layer = LoRALinear(nn.Linear(in_features, out_features, dtype=torch.float64), 1, 3)
    with torch.no_grad():
        layer.lora_A.copy_(torch.arange(1.0, in_features + 1)[None])
        layer.lora_B.copy_(10 * torch.arange(1.0, out_features + 1)[:, None])
    want = 3 * torch.tensor([[10.0 * (o + 1) * (i + 1) for i in range(in_features)] for o in range(out_features)])
    assert torch.equal(layer.delta_weight(), want.double())
    x = torch.randn(4, in_features, dtype=torch.float64)
    torch.testing.assert_close(merge(layer)(x), layer(x))
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + x @ want.double().T)


def test_bug_17_the_file_holds_the_adapter_alone(tmp_path):
    """peft#2092, #286; trl#1287; Olive PR#1027; qlora PR#44: the whole base was saved with it, or nothing was."""
    model = small()
    model[2].weight = nn.Parameter(torch.randn(20, 8))
    model.append(nn.Linear(20, 5))
    inject(model, ["0", "2"], r=3, alpha=5)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert set(load_file(file)) == {f"base_model.model.{i}.lora_{k}.weight" for i in (0, 2) for k in "AB"}
    numbers = 3 * (12 + 8) + 3 * (8 + 20)
    assert 4 * numbers == 4 * count_parameters(model).lora < file.stat().st_size < 4 * numbers + 600


def test_bug_18_a_loaded_adapter_is_applied(tmp_path):
    """peft#2566, #2699, PR#2118; lerobot#3459: keys that did not match gave a warning and an untrained adapter."""
    model, x = adapted(), torch.randn(4, 12)
    fresh = small()
    fresh.load_state_dict({name: tensor for name, tensor in values(model).items() if "lora" not in name})
    save_adapter(model, tmp_path)
    assert load_adapter(fresh, tmp_path) == ["0", "1", "2"] and torch.equal(fresh(x), model(x))
    assert load_adapter(fresh, tmp_path) == ["0", "1", "2"] and torch.equal(fresh(x), model(x)), "resumed, not wrapped"
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for wrong in ({k.replace("base_model.model.", ""): t for k, t in tensors.items()},
                  {k: t for k, t in tensors.items() if ".1." not in k},
                  {k.replace(".1.", ".7."): t for k, t in tensors.items()}):
        save_file(wrong, file)
        with pytest.raises(AdapterError):
            load_adapter(fresh, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bug_19_a_16_bit_base_trains_its_adapter_in_float32(dtype):
    """peft#1249, PR#1706, #341, #2421: 16-bit A and B lose small steps, and cannot be unscaled."""
    model = small(dtype)
    inject(model, "all-linear", 3, 5)
    optimizer, x = torch.optim.SGD(lora_parameters(trained(model)), lr=1e-6), torch.randn(4, 12, dtype=dtype)
    start = [p.clone() for p in lora_parameters(model)]
    output = model(x)
    output.float().sum().backward()
    optimizer.step()
    assert output.dtype == dtype
    for p, before in zip(lora_parameters(model), start, strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        moved = (p != before).sum()
        assert moved > 0.5 * p.numel() and moved > 4 * (p.to(dtype) != before.to(dtype)).sum(), "16 bits lose the step"


def test_bug_19_training_works_under_autocast():
    """peft#1249, PR#1706: the two matmuls met in different dtypes."""
    model = adapted()
    x = torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in lora_parameters(model))
    torch.testing.assert_close(output.float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bug_20_A_and_B_are_made_where_the_base_is(dtype):
    """AstrAI PR#18, #19; diffusers#5897: A and B stayed on the CPU, in float32."""
    model = small(dtype).to("meta")
    inject(model, "all-linear", 3, 5)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", dtype)}
    merged_shapes = [m.delta_weight().shape for m in model]
    assert merged_shapes == [(8, 12), (8, 8), (20, 8)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_bug_22_gradient_checkpointing(use_reentrant):
    """kohya-ss sd-scripts#323: "None of the inputs have requires_grad", and no gradient at all."""
    model, x = adapted(dropout=0.2), torch.randn(4, 12, requires_grad=use_reentrant)  # the old way needs it
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in lora_parameters(model)])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


def test_bug_23_base_head_and_lora_are_counted_apart():
    """microsoft/LoRA#16; peft#801: whether a trained head belongs to the count."""
    model = small()
    inject(model, ["0", "1"], r={"0": 2, "1": 5}, alpha=1)
    lora = 2 * (12 + 8) + 5 * (8 + 8)
    assert count_parameters(model) == (12 * 8 + 8 + 8 * 8 + 8 + 8 * 20 + 20 + lora, lora, lora)
    model[2].requires_grad_(True)
    assert count_parameters(model)[1:] == (lora + 8 * 20 + 20, lora)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_bug_24_layers_can_be_copied_and_pickled(duplicate, init):
    """loralib keeps a lambda in its layers: they cannot be pickled."""
    model, x = adapted(init=init), torch.randn(4, 12)
    twin = duplicate(model)
    assert torch.equal(twin(x), model(x)) and same(values(merge(twin)), values(merge(model)))
    assert [name for name, m in twin.named_modules() if isinstance(m, LoRALinear)] == ["0", "1", "2"]


def test_an_old_gradient_does_not_move_the_frozen_base():
    model = small()
    model(torch.randn(3, 12)).sum().backward()
    inject(model, "all-linear", 2, 4)
    before = [p.clone() for p in model.parameters()]
    torch.optim.AdamW(model.parameters(), lr=1.0).step()  # all of them, although only A and B are to be trained
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_bug_25_a_second_injection_is_an_error():
    """rasbt's appendix E nests a second adapter in the first; PEFT warns."""
    model = adapted()
    before = values(model)
    for targets in ("all-linear", ["0"], "lora_A"):
        with pytest.raises(ValueError, match=r"has LoRA layers already \(0, 1, 2\)"):
            inject(model, targets, r=2, alpha=4)
    assert same(values(model), before)
    with pytest.raises(TypeError, match="not a LoRALinear"):
        LoRALinear(model[0], 2, 4)
