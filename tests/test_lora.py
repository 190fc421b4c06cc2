"""lora_lab.lora: what the layer computes, what the functions around it do to a model, and what they refuse."""

import copy
import io
import math
import pickle
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from lora_lab.lora import (
    INITS,
    LoRALinear,
    disabled,
    inject,
    load_adapter,
    lora_parameters,
    merge,
    remove,
    save_adapter,
)
from lora_lab.models import MLP, count_parameters


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small() -> nn.Sequential:
    """Wide to narrow, square, narrow to wide."""
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5))


def trained(model: nn.Module) -> nn.Module:
    """As if trained: no A or B is at its start."""
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(torch.randn_like(p))
    return model


def adapted(**settings) -> nn.Sequential:
    model = small()
    inject(model, "all-linear", **{"r": 2, "alpha": 4, **settings})
    return trained(model)


def fingerprint(model: nn.Module) -> list:
    """Everything that a refused operation must leave alone, down to the bits and the identity of each tensor."""
    def bits(t):
        return t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return [(path, id(m), type(m), m.training, m.extra_repr(), [(n, id(t), t.requires_grad, bits(t))
             for n, t in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))])
            for path, m in model.named_modules()]


# --- the layer ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [4, 6, 9])
def test_forward_is_the_formula_of_the_docstring(shape, bias, out):
    base = nn.Linear(6, out, bias=bias, dtype=torch.float64)
    layer = trained(LoRALinear(base, r=3, alpha=5))
    x = torch.randn(shape, dtype=torch.float64)
    h = x @ base.weight.T + (5 / 3) * x @ layer.lora_A.T @ layer.lora_B.T + (base.bias if bias else 0)
    assert layer(x).shape == (*shape[:-1], out)
    torch.testing.assert_close(layer(x), h, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer(x), F.linear(x, base.weight + layer.delta_weight(), base.bias), rtol=0, atol=1e-13)


def test_scaling_is_alpha_by_r_or_by_its_root():
    assert LoRALinear(nn.Linear(8, 8), 4, 6).scaling == 1.5
    assert LoRALinear(nn.Linear(8, 8), 4, 6, rslora=True).scaling == 3.0


def test_the_layer_adopts_the_base_parameters_and_freezes_them():
    base = nn.Linear(6, 4)
    layer = LoRALinear(base, 2, 4)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.shape == (2, 6) and layer.lora_B.shape == (4, 2)
    assert "r=2, alpha=4" in repr(layer) and "rslora" not in repr(layer)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_start_of_A_has_its_distribution_and_B_is_zero(init):
    layer = LoRALinear(nn.Linear(1600, 512), 400, 1, init=init)  # 640,000 draws: a std within 3 % is 38 sigma wide
    A = layer.lora_A.detach() * math.sqrt(1600)
    std, largest = (1, 4) if init == "gaussian" else (1 / math.sqrt(3), 1)
    assert A.std().item() == pytest.approx(std, rel=0.03) and abs(A.mean().item()) < 0.01
    assert (A.abs().max() > 4) if init == "gaussian" else (0.999 < A.abs().max() <= 1)
    middle = math.erf(math.sqrt(2)) if init == "gaussian" else 0.5  # within two sigma; within half the range
    assert (A.abs() < largest / 2).float().mean().item() == pytest.approx(middle, abs=5e-3)
    assert not layer.lora_B.any()


def test_kaiming_draws_what_torch_draws_for_a_linear_layer():
    torch.manual_seed(3)
    A = LoRALinear(nn.Linear(50, 30), 8, 1, init="kaiming").lora_A
    torch.manual_seed(3)
    nn.Linear(50, 30)
    torch.testing.assert_close(A, nn.init.kaiming_uniform_(torch.empty(8, 50), a=math.sqrt(5)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_before_training_the_output_is_the_base_output_bit_for_bit(init, dtype):
    model, x = small().to(dtype), torch.randn(7, 6, dtype=dtype)
    before = model(x)
    inject(model, "all-linear", r=2, alpha=3, init=init)
    assert torch.equal(model(x), before)


def test_pissa_starts_from_the_best_rank_r_part_of_the_weight():
    base = nn.Linear(9, 7, dtype=torch.float64)
    layer = LoRALinear(base, 3, 5, init="pissa")
    start = layer.scaling * layer.lora_B @ layer.lora_A
    tail = torch.linalg.svdvals(base.weight)[3:]
    assert torch.linalg.matrix_rank(start) == 3
    torch.testing.assert_close((base.weight - start).square().sum(), tail.square().sum())  # Eckart-Young
    assert not layer.delta_weight().any() and {n for n, _ in layer.named_buffers()} == {"start_A", "start_B"}


def test_svd_changes_the_model_by_s_times_the_top_of_the_weight():
    model, x = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64)), torch.randn(7, 6, dtype=torch.float64)
    before = model(x)
    inject(model, "all-linear", r=2, alpha=4, init="svd")
    U, S, Vh = torch.linalg.svd(model[0].weight)
    top = (U[:, :2] * S[:2]) @ Vh[:2]
    torch.testing.assert_close(model(x), before + 2 * x @ top.T)


# --- dtype, device, copies, compilers -----------------------------------------------------------------------------

@pytest.mark.parametrize(("base", "lora"), [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"),
                                            ("float64", "float64")])
def test_dtypes_of_adapter_output_and_merged_weight(base, lora):
    base, lora = getattr(torch, base), getattr(torch, lora)
    model = small().to(base)
    inject(model, "all-linear", 2, 4)
    assert {p.dtype for p in lora_parameters(trained(model))} == {lora}
    h = model(torch.randn(3, 6, dtype=base))
    h.sum().backward()
    assert h.dtype == base and all(p.grad.isfinite().all() and p.grad.any() for p in lora_parameters(model))
    assert {p.dtype for p in merge(model).parameters()} == {base}


def test_a_model_cast_after_injection_works_in_that_dtype():
    model = adapted().double()
    wide = model(x := torch.randn(3, 6, dtype=torch.float64))
    low = model.bfloat16()(x.bfloat16())
    assert wide.dtype == torch.float64 and low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), wide, rtol=0.1, atol=0.1)


def test_meta_device():
    model = nn.Sequential(nn.Linear(6, 4, device="meta"), nn.Linear(4, 5, device="meta", dtype=torch.bfloat16))
    inject(model, ["0"], 2, 4, init="pissa")
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert model[0](torch.empty(3, 6, device="meta")).shape == (3, 4)


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save", "state_dict"])
def test_copies_compute_the_same_and_share_nothing(way, init):
    model, x = adapted(init=init, dropout=0.1).eval(), torch.randn(3, 6)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = adapted(init=init, dropout=0.1).eval()
        twin.load_state_dict(model.state_dict())
    before = model(x)
    assert torch.equal(twin(x), before)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x), before)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")),
                    reason="torch.compile needs a C++ compiler, and there is none on the PATH")
def test_torch_compile_gives_the_same():
    model, x = trained(LoRALinear(nn.Linear(6, 4), 2, 4)), torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_a_traced_model_sees_disabled_and_load(tmp_path):
    model, x = adapted(init="pissa"), torch.randn(3, 6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # traced and guarded, but not compiled
    save_adapter(adapted(r=1), tmp_path)
    for _ in range(2):
        assert torch.equal(compiled(x), model(x))
        with disabled(model):
            assert torch.equal(compiled(x), model(x))
        load_adapter(model, tmp_path)
    assert torch.equal(compiled(x), model(x))


def test_disabled_sees_through_a_forward_that_something_else_has_set():
    model, x = adapted(), torch.randn(3, 6)
    for layer in (model[0], model[4]):
        layer.forward = partial(type(layer).forward, layer)  # as accelerate does
    want = model(x)
    with disabled(model):
        base = model(x)
        with disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), want) and not torch.equal(base, want)
    remove(model)
    assert torch.equal(model(x), base)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = adapted(), torch.randn(3, 6)
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in lora_parameters(model)]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(lora_parameters(model), want, strict=True))


# --- which layers -------------------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.xfc = nn.Linear(4, 4), nn.Linear(4, 4)
        self.emb, self.conv = nn.Embedding(3, 4), nn.Conv1d(2, 2, 1)


def with_more(change):
    model = nn.Sequential(nn.Linear(4, 4))
    change(model[0])
    return model


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.block, self.blocks = nn.Linear(4, 4), Block(), nn.ModuleList([Block(), Block()])


@pytest.mark.parametrize(("target_modules", "paths"), [
    ("fc", ["fc", "block.fc", "blocks.0.fc", "blocks.1.fc"]),
    (["block.fc"], ["block.fc"]),
    (["1.fc", "block.xfc"], ["block.xfc", "blocks.1.fc"]),
    ({"blocks.0.fc", "fc"}, ["fc", "block.fc", "blocks.0.fc", "blocks.1.fc"]),
    ("all-linear", ["fc", "block.fc", "block.xfc", "blocks.0.fc", "blocks.0.xfc", "blocks.1.fc", "blocks.1.xfc"]),
])
def test_names_are_whole_paths_or_their_ends_at_a_dot(target_modules, paths):
    model = Nested()
    assert inject(model, target_modules, r=2, alpha=4) == paths
    assert [p for p, m in model.named_modules() if isinstance(m, LoRALinear)] == paths
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{p}.lora_{k}" for p in paths for k in "AB"}


def test_r_and_alpha_by_layer_take_the_most_exact_name():
    model = Nested()
    inject(model, "fc", r={"fc": 1, "block.fc": 2, "0.fc": 3}, alpha={"fc": 5, "blocks.1.fc": 7})
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert [m.r for m in layers] == [1, 2, 3, 1] and [m.alpha for m in layers] == [5, 5, 5, 7]


@pytest.mark.parametrize(("model", "target_modules", "message"), [
    (Nested, "nope", "'nope' fits no layer"),
    (Nested, ["fc", "c"], "'c' fits no layer"),
    (Nested, ["fc", "block.emb"], "'block.emb' is a Embedding"),
    (Nested, "conv", "'conv' is a Conv1d"),
    (Nested, "block", "'block' is a Block"),
    (Nested, [], "target_modules is empty"),
    (nn.Tanh, "all-linear", "no nn.Linear"),
    (lambda: nn.MultiheadAttention(4, 2), "out_proj", "is a NonDynamicallyQuantizableLinear"),
    (lambda: nn.Sequential(LoRALinear(nn.Linear(4, 4), 1, 1)), "0", "has LoRA layers already"),
    (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4)), "linear1", "set_fastpath_enabled"),
    (lambda: with_more(lambda m: prune.random_unstructured(m, "weight", 0.5)), "0", "its weight_mask, weight_orig"),
    (lambda: with_more(lambda m: m.register_buffer("mask", torch.ones(4))), "0", "layer '0' is more than .* its mask"),
    (lambda: with_more(lambda m: setattr(m, "forward", torch.relu)), "0", "its forward would be lost"),
])
def test_a_target_that_cannot_be_adapted_is_an_error_and_changes_nothing(model, target_modules, message):
    model = model()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        inject(model, target_modules, r=2, alpha=4)
    assert fingerprint(model) == before


def test_no_target_is_an_error():
    with pytest.raises(TypeError, match='"all-linear"'):
        inject(small(), None, r=2, alpha=4)


def test_what_others_wrote_on_a_layer_stays():
    model = small()
    model[0].origin = "here"
    inject(model, "all-linear", r=2, alpha=4)
    assert model[0].origin == "here"
    remove(model)
    assert model[0].origin == "here" and vars(model[0]).keys() == vars(nn.Linear(1, 1)).keys() | {"origin"}


NAN = float("nan")


@pytest.mark.parametrize(("settings", "error", "message"), [
    (dict(r=0), ValueError, "r = 0 for layer '0': it must be from 1 to min"),
    (dict(r=-1), ValueError, "r = -1"),
    (dict(r=5), ValueError, r"r = 5 for layer '0': it must be from 1 to min\(in, out\) = 4"),
    (dict(r={"0": 4, "2": 4, "4": 5}), ValueError, "r = 5 for layer '4'"),
    (dict(r=2.0), TypeError, "r = 2.0 .* int"),
    (dict(r=True), TypeError, "r = True"),
    (dict(r={"0": 1, "2": 1}), ValueError, "r has no entry for layer '4'"),
    (dict(r={"0": 1, "2": 1, "4": 1, "5": 1}), ValueError, "r names '5'"),
    (dict(alpha=float("inf")), ValueError, "alpha = inf"),
    (dict(alpha=NAN), ValueError, "alpha = nan"),
    (dict(alpha="8"), TypeError, "alpha = '8'"),
    (dict(alpha=10**400), ValueError, "alpha = 1000"),
    (dict(alpha={"2": 1}), ValueError, "alpha has no entry for layer '0'"),
    (dict(alpha=0, init="pissa"), ValueError, "for pissa positive"),
    (dict(dropout=1), ValueError, "dropout = 1 "),
    (dict(dropout=-0.1), ValueError, "dropout = -0.1"),
    (dict(dropout=NAN), ValueError, "dropout = nan"),
    (dict(dropout="0.1"), TypeError, "dropout = '0.1'"),
    (dict(dropout=None), TypeError, "dropout = None"),
    (dict(init="xavier"), ValueError, "'xavier' for layer '0' is not one of gaussian, kaiming, pissa, svd"),
    (dict(init=None), ValueError, "None for layer '0' is not one of"),
    (dict(init=(torch.ones(2, 6), torch.ones(4, 3))), ValueError, r"must be \(2, 6\) and \(4, 2\)"),
])
def test_a_setting_that_cannot_work_is_an_error_and_changes_nothing(settings, error, message):
    model = small()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        inject(model, "all-linear", **{"r": 2, "alpha": 4, **settings})
    assert fingerprint(model) == before
    if not any(isinstance(value, dict) for value in settings.values()):
        with pytest.raises(error):
            LoRALinear(model[0], **{"r": 2, "alpha": 4, **settings})
        assert fingerprint(model) == before


@pytest.mark.parametrize("init", ["pissa", "svd"])
def test_a_weight_without_singular_values_is_an_error_and_changes_nothing(init):
    model = small()
    model[4].weight.data[0, 0] = NAN  # not the first: the layers before it must be left alone too
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"'{init}' for layer '4': the weight holds NaN"):
        inject(model, "all-linear", 2, 4, init=init)
    assert fingerprint(model) == before


@pytest.mark.parametrize("base", [nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), LoRALinear(nn.Linear(4, 4), 1, 1)])
def test_only_an_nn_linear_can_be_the_base(base):
    with pytest.raises(TypeError, match=f"nn.Linear, not a {type(base).__name__}"):
        LoRALinear(base, 2, 4)


def test_transformer_encoder_layer_works_once_its_fast_path_is_off():
    model, x = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), torch.randn(2, 3, 4)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inject(model, ["linear1", "linear2"], 2, 4)
        assert torch.equal(trained(model).eval()(x), model.train()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- models of unusual make ---------------------------------------------------------------------------------------

def test_a_root_linear_is_adapted_in_place(tmp_path):
    model, x = nn.Linear(6, 4), torch.randn(3, 6)
    weight, before = model.weight, model(x)
    assert inject(model, "all-linear", 2, 4) == [""] and type(model) is LoRALinear and model.weight is weight
    after = trained(model)(x)
    assert not torch.equal(after, before)
    save_adapter(model, tmp_path)
    assert type(merge(model)) is nn.Linear and type(model) is LoRALinear
    remove(model)
    assert type(model) is nn.Linear and torch.equal(model(x), before)
    assert load_adapter(model, tmp_path) == [""] and torch.equal(model(x), after)


def test_a_module_in_two_places_is_adapted_once_in_both(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    assert inject(model, "all-linear", 2, 4) == ["0"] and model[2] is model[0]
    x = torch.randn(3, 4, dtype=torch.float64)
    trained(model).double()(x).sum().backward()
    W = (model[0].weight + model[0].delta_weight()).detach().requires_grad_()
    F.linear(F.linear(x, W, model[0].bias).tanh(), W, model[0].bias).sum().backward()
    torch.testing.assert_close(model[0].lora_B.grad, 2 * W.grad @ model[0].lora_A.T)  # both uses, s = 2
    merged = merge(model)
    assert merged[2] is merged[0] and count_parameters(model).lora == 2 * (4 + 4)
    save_adapter(model, tmp_path)
    assert load_adapter(model, tmp_path) == ["0"] and model[2] is model[0]
    remove(model)
    assert inject(model, ["2"], 2, 4) == ["2"] and model[2] is model[0], "either name means it"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens):
        return self.head(self.emb(tokens))


def test_tied_weights_stay_tied_until_they_are_merged():
    model, tokens = Tied(), torch.tensor([1, 5])
    inject(model, "head", 2, 4)
    assert model.head.weight is model.emb.weight and not model.emb.weight.requires_grad
    assert count_parameters(trained(model)) == (28 + 22, 22, 22)
    merged = merge(model)
    assert torch.equal(merged.emb.weight, model.emb.weight) and model.head.weight is model.emb.weight
    torch.testing.assert_close(merged(tokens), model(tokens))


def test_hooks_and_mode_of_a_layer_stay():
    model, calls = small().train(), []
    model[2].register_forward_hook(lambda *_: calls.append("forward"))
    model[2].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[4].eval()
    inject(model, "all-linear", 2, 4, dropout=0.5)
    assert model[2].dropout.training and not model[4].training and not model[4].dropout.training
    for m in (model, merge(model)):
        calls.clear()
        m(torch.randn(1, 6, requires_grad=True)).sum().backward()
        assert calls == ["pre", "forward", "backward"] and not m[4].training
    remove(model)
    calls.clear()
    model(torch.randn(1, 6))
    assert calls == ["pre", "forward"] and not model[4].training


def test_a_checkpoint_of_the_base_still_loads():
    checkpoint_of_base, model = small().state_dict(), adapted()
    result = model.load_state_dict(checkpoint_of_base, strict=False)
    assert result.unexpected_keys == [] and result.missing_keys == [f"{i}.lora_{k}" for i in (0, 2, 4) for k in "AB"]
    assert torch.equal(model[0].weight, checkpoint_of_base["0.weight"])


# --- disabled, merge, remove, switch ------------------------------------------------------------------------------

@pytest.mark.parametrize("init", ["gaussian", "pissa", "svd"])
def test_disabled_is_the_base_bit_for_bit_and_ends(init):
    model, x = small(), torch.randn(3, 6)
    base = model(x)
    inject(model, "all-linear", 2, 4, init=init)
    with_lora = trained(model)(x)
    with disabled(model) as same:
        assert same is model and torch.equal(model(x), base)
        with disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)  # the inner block's end is not the outer's
    assert torch.equal(model(x), with_lora)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(model(x), with_lora)


def test_an_adapter_may_be_taken_off_or_exchanged_inside_disabled(tmp_path):
    model, x = adapted(), torch.randn(3, 6)
    save_adapter(model, tmp_path)
    on = model(x)
    model[0].forward = partial(LoRALinear.forward, model[0])  # as other tools set one
    with disabled(model):
        load_adapter(model, tmp_path)
        assert torch.equal(model(x), on)  # the new one is on
        remove(model)
        base = model(x)
    assert torch.equal(model(x), base) and not torch.equal(base, on)
    assert "enabled" not in vars(model[0])


def test_inside_disabled_the_adapter_is_still_there(tmp_path):
    model, x = adapted(), torch.randn(3, 6)
    with_lora, counts = model(x), count_parameters(model)
    with disabled(model):
        assert count_parameters(model) == counts
        with pytest.raises(ValueError, match="LoRA layers already"):
            inject(model, "all-linear", 2, 4)
        save_adapter(model, tmp_path)
        assert set(merge(model).state_dict()) == set(small().state_dict())
        torch.testing.assert_close(merge(model)(x), with_lora)
        remove(model)
    assert {type(m) for m in model} == {nn.Linear, nn.Tanh}
    load_adapter(model, tmp_path)
    assert torch.equal(model(x), with_lora)


@pytest.mark.parametrize("init", INITS)
def test_merge_makes_a_plain_model_and_leaves_the_given_one_alone(init):
    model, x = adapted(init=init, dropout=0.3).eval(), torch.randn(3, 6)
    before = fingerprint(model)
    merged = merge(model)
    assert fingerprint(model) == before
    assert [type(m) for m in merged] == [type(m) for m in small()]
    assert set(merged.state_dict()) == set(small().state_dict()) and not any(m.training for m in merged.modules())
    torch.testing.assert_close(merged(x), model(x))
    assert not {id(p) for p in merged.parameters()} & {id(p) for p in model.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(merge(merged).parameters(), merged.parameters(), strict=True))


def test_merge_refuses_what_overflows_the_dtype_of_the_base():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    inject(model, "1", 2, 4)
    with torch.no_grad():
        model[1].lora_A.fill_(300)
        model[1].lora_B.fill_(300)  # s B A = 360,000; float16 ends at 65,504
    before = fingerprint(model)
    with pytest.raises(ValueError, match="layer '1' holds NaN or Inf"):
        merge(model)
    assert fingerprint(model) == before


def test_remove_gives_the_base_back():
    model = small().requires_grad_(False)
    before = fingerprint(model)
    inject(model, "all-linear", 2, 4, init="pissa")
    remove(trained(model))
    assert fingerprint(model) == before
    remove(model)
    assert fingerprint(model) == before


def test_adapters_switch_on_one_base_bit_for_bit(tmp_path):
    model, x = small(), torch.randn(3, 6)
    base, outputs = model(x), {}
    for name, settings in {"a": dict(r=2, alpha=4), "b": dict(r={"0": 1, "4": 3}, alpha=5, rslora=True)}.items():
        inject(model, ["0", "4"], **settings)
        outputs[name] = trained(model)(x)
        save_adapter(model, tmp_path / name)
        remove(model)
    for name in "abab":
        assert load_adapter(model, tmp_path / name) == ["0", "4"]
        assert torch.equal(model(x), outputs[name])
        with torch.no_grad():
            model[0].lora_B.zero_()  # the file is a copy: training on does not change it
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{i}.lora_{k}" for i in "04" for k in "AB"}
    with disabled(model):
        assert torch.equal(model(x), base)
    remove(model)
    assert torch.equal(model(x), base)


def test_no_function_but_inject_draws_random_numbers(tmp_path):
    model = adapted()
    state = torch.get_rng_state()
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
    merge(model)
    with disabled(model):
        model(torch.ones(1, 6))
    remove(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_an_adapter_there_is_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(small(), tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == [] and list(lora_parameters(small())) == []


def test_counts_of_the_course_model():
    model = MLP()
    assert count_parameters(model) == (535_818, 535_818, 0)
    inject(model, "all-linear", r=4, alpha=8)
    assert count_parameters(model) == (545_138, 9_320, 9_320)
    assert count_parameters(merge(model)) == (535_818, 0, 0)
