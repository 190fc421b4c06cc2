"""Against PEFT and loralib: the same numbers, bit for bit, and the same files, both ways.

Every test runs with warnings as errors, so that none of PEFT's ("Found missing adapter keys", ...) can pass unseen.
"""

import json
import os
import pickle
import warnings
from contextlib import nullcontext
from functools import partial

import loralib
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import peft

from lora_lab import adapter_files
from lora_lab.lora import (
    AdapterError,
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

pytestmark = pytest.mark.filterwarnings("error")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.other, self.norm = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.other(torch.tanh(self.fc(x))))


class Nested(nn.Module):
    """Names that are ends of one another, numbers as names, and a name that is a regular expression for another."""

    def __init__(self):
        super().__init__()
        self.fc, self.block, self.net = nn.Linear(6, 6), Block(), nn.Sequential(Block(), Block())
        self.xfc, self.q_1, self.qx1 = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.qx1(self.q_1(self.xfc(self.net(self.block(self.fc(x))))))


def twins(make=MLP):
    """Two models with the same weights."""
    one, two = make(), make()
    two.load_state_dict(one.state_dict())
    return one, two


def train_a_bit(parameters):
    """As if trained: no A or B is at its start, and s B A is about as large as W."""
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * 0.3 / p.shape[1] ** 0.5)


def trained(model):
    train_a_bit(lora_parameters(model))
    return model


def peft_layers(model) -> dict:
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules()
            if isinstance(m, peft.tuners.lora.Linear)}


def trained_peft(model):
    train_a_bit(p for name, p in model.named_parameters() if "lora_" in name)
    return model


def side_by_side(alpha=8, dtype=torch.float32, rslora=False, r=4, dropout=0.0):
    """Our MLP and PEFT's with the same weights, A and B, all of them as if trained."""
    ours, theirs = (m.to(dtype) for m in twins())
    inject(ours, "all-linear", r=r, alpha=alpha, rslora=rslora, dropout=dropout)
    trained(ours)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, lora_dropout=dropout,
                                                         target_modules=["fc1", "fc2", "fc3"]))
    for path, layer in peft_layers(theirs).items():
        mine = ours.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(mine.lora_A)
        layer.lora_B["default"].weight.data.copy_(mine.lora_B)
    return ours, theirs


def gradients(ours, theirs):
    for path, layer in peft_layers(theirs).items():
        mine = ours.get_submodule(path)
        yield mine.lora_A.grad, layer.lora_A["default"].weight.grad
        yield mine.lora_B.grad, layer.lora_B["default"].weight.grad


# --- the same numbers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [1, 8, 32])
def test_outputs_and_all_gradients_are_bit_equal_to_peft(alpha, rslora):
    ours, theirs = side_by_side(alpha, rslora=rslora)  # r = 4, so s is a power of two
    x, y = torch.randn(32, 784), torch.randint(10, (32,))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.equal(ours(x1), theirs(x2))
    F.cross_entropy(ours(x1), y).backward()
    F.cross_entropy(theirs(x2), y).backward()
    assert torch.equal(x1.grad, x2.grad)
    assert all(torch.equal(a, b) for a, b in gradients(ours, theirs)) and len(list(gradients(ours, theirs))) == 6
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == count_parameters(ours).trainable == 9320


@pytest.mark.parametrize(("alpha", "r"), [(3, 4), (8, 3), (10, 7)])
def test_with_another_scale_they_agree_within_1e_6(alpha, r):
    ours, theirs = side_by_side(alpha, r=r)
    x, y = torch.randn(32, 784), torch.randint(10, (32,))
    torch.testing.assert_close(ours(x) / theirs(x).abs().max(), theirs(x) / theirs(x).abs().max(), rtol=0, atol=1e-6)
    F.cross_entropy(ours(x), y).backward()
    F.cross_entropy(theirs(x), y).backward()
    for a, b in gradients(ours, theirs):
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), rtol=0, atol=1e-6)


def test_dropout_draws_the_same_masks_as_peft():
    ours, theirs = side_by_side(dropout=0.3)
    x = torch.randn(32, 784)
    torch.manual_seed(1)
    a = ours.train()(x)
    torch.manual_seed(1)
    assert torch.equal(a, theirs.train()(x)) and not torch.equal(a, ours(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_follows_the_dtype_policy_of_peft(autocast):
    ours, theirs = side_by_side(dtype=torch.bfloat16)
    assert {p.dtype for p in theirs.parameters() if p.requires_grad} == {p.dtype for p in lora_parameters(ours)}
    x = torch.randn(32, 784, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        a, b = ours(x), theirs(x)
    assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b)
    a.float().square().sum().backward()
    b.float().square().sum().backward()
    assert all(g.dtype == torch.float32 and torch.equal(g, h) for g, h in gradients(ours, theirs))


def test_fp64_base_follows_peft_too():
    ours, theirs = side_by_side(dtype=torch.float64)
    assert {p.dtype for p in theirs.parameters() if p.requires_grad} == {p.dtype for p in lora_parameters(ours)}
    x = torch.randn(4, 784, dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_are_those_of_peft(dtype):
    ours, theirs = side_by_side(dtype=dtype)
    merged, want = merge(ours), theirs.merge_and_unload()
    for name, weight in want.state_dict().items():
        assert torch.equal(merged.state_dict()[name], weight), name


def test_disabled_is_what_peft_calls_disabled():
    ours, theirs = side_by_side()
    x = torch.randn(4, 784)
    with disabled(ours), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_that_of_peft(rslora):
    ours, theirs = twins()
    inject(ours, "all-linear", r=4, alpha=8, init="pissa", rslora=rslora)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "fc2", "fc3"],
                                                         init_lora_weights="pissa", use_rslora=rslora))
    x, steps = torch.randn(32, 784), 3
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.01) for m in (ours, theirs)]
    for path, layer in peft_layers(theirs).items():
        mine = ours.get_submodule(path)
        assert torch.equal(mine.lora_A, layer.lora_A["default"].weight)
        assert torch.equal(mine.lora_B, layer.lora_B["default"].weight)
    before = ours(x)
    for _ in range(steps):  # from one start by the same gradients to the same function
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert (ours(x) - before).abs().max() > 1e-3
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [4, 8])
def test_outputs_and_gradients_are_bit_equal_to_loralib(alpha):
    base = nn.Linear(20, 12)
    ours, theirs = LoRALinear(base, 4, alpha), loralib.Linear(20, 12, r=4, lora_alpha=alpha)
    trained(ours)
    theirs.load_state_dict(ours.state_dict())  # the names are the same
    loralib.mark_only_lora_as_trainable(theirs)
    x = torch.randn(5, 20)
    assert torch.equal(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert torch.equal(ours.lora_A.grad, theirs.lora_A.grad) and torch.equal(ours.lora_B.grad, theirs.lora_B.grad)
    nn.Module.train(theirs, False)
    theirs.train(False)  # loralib merges here
    torch.testing.assert_close(merge(ours)(x), theirs(x), rtol=0, atol=0)


# --- our files in PEFT --------------------------------------------------------------------------------------------

EVERY = ["fc", "block.fc", "block.other", "net.0.fc", "net.0.other", "net.1.fc", "net.1.other", "xfc", "q_1", "qx1"]
CASES = {
    "uniform": (MLP, "all-linear", dict(r=4, alpha=8)),
    "mixed": (MLP, "all-linear", dict(r={"fc1": 4, "fc2": 8, "fc3": 2}, alpha={"fc1": 8, "fc2": 16, "fc3": 3})),
    "mixed rslora": (MLP, "all-linear", dict(r={"fc1": 4, "fc2": 8, "fc3": 2}, alpha={"fc1": 8, "fc2": 16, "fc3": 3},
                                             rslora=True)),
    "one layer": (MLP, "fc2", dict(r=3, alpha=5)),
    "dropout": (MLP, "all-linear", dict(r=4, alpha=8, dropout=0.25)),
    "alpha is a float": (MLP, "fc1", dict(r=4, alpha=0.1)),
    "nested": (Nested, "all-linear", dict(r=2, alpha=4)),
    "nested, mixed": (Nested, "all-linear", dict(r={n: 1 + i % 4 for i, n in enumerate(EVERY)},
                                                 alpha={n: 1 + i % 3 for i, n in enumerate(EVERY)})),
    "the end of another path": (Nested, ["block.fc", "net.0.fc"], dict(r=2, alpha=4)),
    "patterns that are ends": (Nested, "fc", dict(r={"fc": 2, "block.fc": 3}, alpha={"fc": 1, "net.1.fc": 5})),
    "pissa": (MLP, "all-linear", dict(r=4, alpha=8, init="pissa")),
    "pissa rslora": (MLP, "all-linear", dict(r=4, alpha=8, init="pissa", rslora=True)),
    "pissa above min(in, out)": (MLP, "all-linear", dict(r=10, alpha=8, init="pissa")),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_save_without_a_word(case, tmp_path):
    make, target_modules, settings = CASES[case]
    ours, base = twins(make)
    inject(ours, target_modules, **settings)
    trained(ours).eval()
    save_adapter(ours, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert set(peft_layers(theirs)) == {p for p, m in ours.named_modules() if isinstance(m, LoRALinear)}
    for path, layer in peft_layers(theirs).items():
        assert layer.scaling["default"] == ours.get_submodule(path).scaling, path
    x = torch.randn(8, 784 if make is MLP else 6)
    if "pissa" in case:  # PEFT adds rank 2r at once, we subtract two ranks of r: the same up to rounding
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    else:
        scales = {layer.scaling["default"] for layer in peft_layers(theirs).values()}
        exact = all(s.hex().split("p")[0] == "0x1.0000000000000" for s in scales)
        torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=0 if exact else 1e-6 * ours(x).abs().max().item())


@pytest.mark.parametrize("taken", [["fc"], ["fc", "q_1"], ["net.0.fc", "xfc", "fc"], ["fc", "block.other"]], ids=str)
def test_suffix_trap_only_the_adapted_layers_are_adapted_in_peft(taken, tmp_path):
    """A listed "fc" means block.fc to PEFT as well: without an exact expression it warns of missing adapter keys."""
    ours, base = twins(Nested)
    for path in taken:  # inject too takes a name for an end
        ours.set_submodule(path, LoRALinear(ours.get_submodule(path), 2, 4))
    trained(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert set(peft_layers(theirs)) == set(taken)
    x = torch.randn(8, 6)
    assert torch.equal(theirs(x), ours(x))
    again = twins(Nested)[0]
    again.load_state_dict(ours.state_dict(), strict=False)
    assert set(load_adapter(again, tmp_path)) == set(taken) and torch.equal(again(x), ours(x))


def test_target_modules_is_a_list_wherever_a_list_is_exact(tmp_path):
    for target_modules, want in (("fc3", ["fc3"]), ("all-linear", ["fc1", "fc2", "fc3"])):
        model = MLP()
        inject(model, target_modules, 4, 8)
        save_adapter(model, tmp_path)
        assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == want


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(case, tmp_path):
    make, target_modules, settings = CASES[case]
    model, other = twins(make)
    inject(model, target_modules, **settings)
    trained(model).eval()
    save_adapter(model, tmp_path / "a")
    load_adapter(other.eval(), tmp_path / "a")
    x = torch.randn(8, 784 if make is MLP else 6)
    if "pissa" in case:
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(other(x), model(x))
    save_adapter(other, tmp_path / "b")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_layers_of_both_scaling_rules_go_into_one_file(tmp_path):
    model, x = MLP(), torch.randn(4, 784)
    model.fc1 = LoRALinear(model.fc1, 4, 8, rslora=True)  # by hand: inject gives all layers the same rule
    model.fc2 = LoRALinear(model.fc2, 4, 8)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.normal_()
    want = model(x)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
    assert model.fc1.scaling == 4 and model.fc2.scaling == 2 and torch.equal(model(x), want)


def test_the_file_holds_a_and_b_and_nothing_else(tmp_path):
    model = MLP()
    inject(model, "all-linear", 4, 8)
    save_adapter(model, tmp_path)
    assert {k: tuple(t.shape) for k, t in load_file(tmp_path / WEIGHTS).items()} == {
        "base_model.model.fc1.lora_A.weight": (4, 784), "base_model.model.fc1.lora_B.weight": (512, 4),
        "base_model.model.fc2.lora_A.weight": (4, 512), "base_model.model.fc2.lora_B.weight": (256, 4),
        "base_model.model.fc3.lora_A.weight": (4, 256), "base_model.model.fc3.lora_B.weight": (10, 4)}
    assert 4 * 9320 < (tmp_path / WEIGHTS).stat().st_size < 4 * 9320 + 1000


# --- PEFT's files here --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "settings"), [
    (MLP, dict(target_modules=["fc1", "fc2", "fc3"])),
    (MLP, dict(target_modules="all-linear")),
    (MLP, dict(target_modules=r"fc[13]", r=16, lora_alpha=4)),
    (MLP, dict(target_modules=["fc1", "fc2"], use_rslora=True, r=16)),
    (MLP, dict(target_modules=["fc1", "fc2", "fc3"], rank_pattern={"fc1": 2, "^fc2": 4}, alpha_pattern={"fc[23]": 16})),
    (MLP, dict(target_modules=["fc1", "fc2"], rank_pattern={"c1": 2}, alpha_pattern={"c2": 1})),  # no ends at a dot
    (MLP, dict(target_modules=["fc1"], lora_dropout=0.5)),
    (MLP, dict(target_modules=["fc1"], init_lora_weights=False)),
    (MLP, dict(target_modules=["fc1"], init_lora_weights="gaussian")),
    (MLP, dict(target_modules=["fc1"], init_lora_weights="orthogonal")),
    (MLP, dict(target_modules=["fc1"], init_lora_weights="mica")),
    (MLP, dict(target_modules=["fc1"], init_lora_weights="eva", eva_config=peft.EvaConfig())),
    (MLP, dict(target_modules="all-linear", exclude_modules=["fc2"])),
    (MLP, dict(target_modules=["fc1"], task_type="FEATURE_EXTRACTION")),
    (Nested, dict(target_modules=["fc"], rank_pattern={"block.fc": 3, "fc": 2}, alpha_pattern={"net.1.fc": 2})),
    (Nested, dict(target_modules=["fc", "block.other"], rank_pattern={"q_1|other": 3, "^fc": 2})),
    (Nested, dict(target_modules=["fc", "other"], layers_to_transform=[1], layers_pattern="net")),
    (Nested, dict(target_modules=["fc", "other"], layers_to_transform=0, layers_pattern="net")),
    (Nested, dict(target_modules=["fc"], exclude_modules="net.*")),
], ids=str)
def test_we_load_what_peft_saves(make, settings, tmp_path):
    ours, base = twins(make)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora with eva initialization", UserWarning)
        warnings.filterwarnings("ignore", ".*keys did not match any targeted module", RuntimeWarning)
        theirs = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    trained_peft(theirs).eval().save_pretrained(tmp_path)
    assert set(load_adapter(ours.eval(), tmp_path)) == set(peft_layers(theirs))
    x = torch.randn(8, 784 if make is MLP else 6)
    for path, layer in peft_layers(theirs).items():
        assert ours.get_submodule(path).scaling == layer.scaling["default"]
    want = theirs.get_base_model()(x)  # it holds the LoRA layers
    torch.testing.assert_close(ours(x), want, rtol=0, atol=1e-6 * want.abs().max().item())
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        f"{path}.lora_{k}" for path in peft_layers(theirs) for k in "AB"}


def test_we_load_a_pissa_that_peft_converted_to_plain_lora(tmp_path):
    ours, base = twins()
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "fc2"],
                                                       init_lora_weights="pissa"))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with warnings.catch_warnings(action="ignore"):  # it warns of PiSSA beside another adapter, and makes one itself
        trained_peft(theirs).save_pretrained(tmp_path / "end",
                                             path_initial_model_for_weight_conversion=tmp_path / "start")
    load_adapter(ours, tmp_path / "end")
    x = torch.randn(8, 784)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_tensors_of_another_dtype_are_read_as_peft_reads_them(dtype, tmp_path):
    ours, base = twins()
    inject(ours, "all-linear", 4, 8)
    save_adapter(trained(ours), tmp_path)
    remove(ours)
    save_file({k: t.to(dtype) for k, t in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    load_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert {p.dtype for p in lora_parameters(ours)} == {torch.float32}
    x = torch.randn(8, 784)
    assert torch.equal(ours(x), theirs(x))


# --- files that must be refused -----------------------------------------------------------------------------------

def fingerprint(model) -> list:
    def bits(t):
        return t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return [(path, id(m), type(m), m.training, [(n, id(p), p.requires_grad, bits(p))
             for n, p in m.named_parameters(recurse=False)]) for path, m in model.named_modules()]


@pytest.fixture
def saved(tmp_path):
    """A good adapter of the MLP, fc1 and fc3 at r = 4."""
    model = MLP()
    inject(model, ["fc1", "fc3"], 4, 8)
    save_adapter(trained(model), tmp_path)
    return tmp_path


def refused(directory, message, error=AdapterError):
    """Whether the model is plain or has an adapter already, it stays as it was."""
    plain, adapted = MLP().eval(), MLP()
    plain.fc2.bias.requires_grad_(False)
    inject(adapted, "fc2", 2, 2)
    for model in (plain, adapted):
        before = fingerprint(model)
        with pytest.raises(error, match=message):
            load_adapter(model, directory)
        assert fingerprint(model) == before


def change_config(directory, **settings):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **settings}))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("settings", "message"), [
    (dict(use_dora=True), "use_dora = True goes beyond plain LoRA"),
    (dict(bias="all"), "bias = 'all'"),
    (dict(bias="lora_only"), "bias = 'lora_only'"),
    (dict(lora_bias=True), "lora_bias = True goes beyond"),
    (dict(modules_to_save=["fc2"]), "modules_to_save = .* goes beyond"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out"),
    (dict(trainable_token_indices=[1]), "trainable_token_indices"),
    (dict(target_parameters=["fc1.weight"]), "target_parameters"),
    (dict(layer_replication=[[0, 1]]), "layer_replication"),
    (dict(use_qalora=True), "use_qalora"),
    (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    (dict(a_setting_of_the_future=1), "a_setting_of_the_future"),
    *((dict(init_lora_weights=i), f"'{i}' changes the base's weights")
      for i in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")),
    (dict(peft_type="IA3"), "peft_type is not LORA"),
    (dict(peft_type=None), "peft_type is not LORA"),
    (dict(r=None), "does not say r"),
    (dict(lora_alpha=None), "does not say lora_alpha"),
    (dict(target_modules=None), "does not say target_modules"),
    (dict(r=8), r"fc1.lora_A.weight has shape \(4, 784\); by the config's r .* \(8, 784\) was expected"),
    (dict(r="4"), r"fc1.lora_A.weight .* by the config's r .*\('4', 784\)"),
    (dict(rank_pattern={"fc3": 2}), r"fc3.lora_A.weight has shape \(4, 256\); by the config's r .* \(2, 256\)"),
    (dict(rank_pattern=["fc3"]), "rank_pattern .* cannot be read"),
    (dict(rank_pattern={"(": 2}), "rank_pattern .* cannot be read"),
    (dict(lora_alpha=NAN), "alpha = nan for layer 'fc1'"),
    (dict(lora_alpha=INF), "alpha = inf for layer 'fc1'"),
    (dict(lora_alpha="8"), "alpha = '8' for layer 'fc1'"),
    (dict(alpha_pattern={"fc3": True}), "alpha = True for layer 'fc3'"),
    (dict(lora_dropout=1.5), "dropout = 1.5 for layer 'fc1'"),
    (dict(lora_dropout="high"), "cannot be used"),
    (dict(target_modules=["fc1"]), "holds .*fc3.lora_A.weight', .* no lora_A.* that the config's target_modules mean"),
    (dict(target_modules=["fc1", "fc2", "fc3"]), "fc2.lora_A.weight is missing"),
    (dict(target_modules="all-linear"), "fc2.lora_A.weight is missing"),
    (dict(target_modules="all-linear", exclude_modules=[]), "fc2.lora_A.weight is missing"),
    (dict(target_modules="all-linear", exclude_modules=["other"]), "fc2.lora_A.weight is missing"),
    (dict(target_modules="all-linear", layers_to_transform=[]), "fc2.lora_A.weight is missing"),
    (dict(target_modules="all-linear", exclude_modules="fc[23]"), "holds .*fc3.lora_A.weight'"),
    (dict(target_modules="fc[1"), "target_modules.* cannot be read"),
    (dict(target_modules=3), "target_modules.* cannot be read"),
], ids=str)
def test_a_config_that_is_not_plain_lora_of_these_layers_is_refused(saved, settings, message):
    change_config(saved, **settings)
    refused(saved, message)


@pytest.mark.parametrize("settings", [
    dict(use_dora=True), dict(bias="all"), dict(bias="lora_only"), dict(lora_bias=True), dict(modules_to_save=["fc3"]),
    dict(init_lora_weights="pissa"), dict(init_lora_weights="olora"),
], ids=str)
def test_what_peft_itself_saves_beyond_plain_lora_is_refused(settings, tmp_path):
    model = peft.get_peft_model(MLP(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "fc2"], **settings))
    with warnings.catch_warnings(action="ignore"):  # of a bias in lora_B
        model.save_pretrained(tmp_path)
    refused(tmp_path, next(iter(settings)))


A1 = "base_model.model.fc1.lora_A.weight"


def without(tensors, *names):
    return {k: t for k, t in tensors.items() if k not in names}


def poisoned(tensor, value):
    tensor = tensor.clone()
    tensor[-1, -1] = value
    return tensor


@pytest.mark.parametrize(("damage", "message"), [
    (lambda t: {}, "fc1.lora_A.weight is missing"),
    (lambda t: without(t, A1), "fc1.lora_A.weight is missing"),
    (lambda t: without(t, A1, A1.replace("_A", "_B")), "fc1.lora_A.weight is missing"),
    (lambda t: without(t, A1.replace("_A", "_B")), "fc1.lora_B.weight is missing"),
    (lambda t: {**t, "extra": torch.ones(1)}, "holds 'extra', which is no lora_A"),
    (lambda t: {**t, "base_model.model.fc1.weight": torch.ones(1)}, "holds .*fc1.weight', which is no lora_A"),
    (lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}, f"{A1} is missing"),
    (lambda t: {k.removesuffix(".weight"): v for k, v in t.items()}, f"{A1} is missing"),
    (lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()}, f"{A1} is missing"),
    (lambda t: {**t, **{k.replace("fc1", "fc9"): v.clone() for k, v in t.items() if "fc1" in k}},
     "holds .*fc9.lora_A.weight', .*Linear layers of the model: 'fc1', 'fc2', 'fc3'; meant: fc1, fc3"),
    (lambda t: {**t, A1: t[A1][:, 1:].contiguous()}, r"fc1.lora_A.weight has shape \(4, 783\).* \(4, 784\) was exp"),
    (lambda t: {**t, A1: t[A1][1:]}, r"fc1.lora_A.weight has shape \(3, 784\).* \(4, 784\) was expected"),
    (lambda t: {**t, A1: t[A1].T.contiguous()}, r"fc1.lora_A.weight has shape \(784, 4\).* \(4, 784\) was expected"),
    (lambda t: {**t, A1: t[A1][0]}, r"fc1.lora_A.weight has shape \(784,\)"),
    (lambda t: {**t, A1: t[A1].to(torch.int32)}, "fc1.lora_A.weight holds something that is not a finite number"),
    *((lambda t, v=v: {**t, A1: poisoned(t[A1], v)}, "fc1.lora_A.weight holds something that is not a finite number")
      for v in (NAN, INF, -INF)),
])
def test_tensors_that_are_missing_extra_misshapen_or_not_finite_are_refused(saved, damage, message):
    save_file(damage(load_file(saved / WEIGHTS)), saved / WEIGHTS)
    refused(saved, message)


def test_a_rank_of_zero_is_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    save_file({k: t[:0] if "_A" in k else t[:, :0].contiguous() for k, t in tensors.items()}, saved / WEIGHTS)
    change_config(saved, r=0)
    refused(saved, "r = 0 for layer 'fc1'")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("a pickle was loaded",)


@pytest.mark.parametrize(("name", "damage", "message"), [
    (WEIGHTS, lambda b: b[:-1], "damaged or cut off"),
    (WEIGHTS, lambda b: b[:200], "damaged or cut off"),
    (WEIGHTS, lambda b: b[:4], "damaged or cut off"),
    (WEIGHTS, lambda b: b"", "damaged or cut off"),
    (WEIGHTS, lambda b: b + b"\0", "damaged or cut off"),
    (WEIGHTS, lambda b: pickle.dumps(Bomb()), "damaged or cut off"),
    (CONFIG, lambda b: b[:-5], "not readable JSON"),
    (CONFIG, lambda b: b"", "not readable JSON"),
    (CONFIG, lambda b: pickle.dumps(Bomb()), "not readable JSON"),
    (CONFIG, lambda b: b"[" * 100_000, "not readable JSON"),
    (CONFIG, lambda b: b"[]", "peft_type is not LORA"),
], ids=lambda value: "damage" if callable(value) else value)
def test_damaged_files_are_refused_and_no_pickle_is_read(saved, name, damage, message, monkeypatch):
    monkeypatch.chdir(saved)
    (saved / name).write_bytes(damage((saved / name).read_bytes()))
    refused(saved, message)
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    refused(saved, f"has no {name}", FileNotFoundError)
    torch.save({A1: torch.ones(4, 784)}, saved / "adapter_model.bin")  # PEFT would unpickle this one
    refused(saved, f"has no {name}", FileNotFoundError)


# --- writing is all or nothing ------------------------------------------------------------------------------------

def second_adapter():
    model = MLP()
    inject(model, ["fc1", "fc3"], 4, 24)  # same shapes, another alpha: a mixture could not be told from its tensors
    return trained(model)


def contents(directory):
    """Which adapter is read: its alpha and its tensors, or None where the reader says that there is none."""
    try:
        adapter = adapter_files.read(directory, {"fc1": (512, 784), "fc2": (256, 512), "fc3": (10, 256)})
    except (FileNotFoundError, AdapterError):
        return None
    return [(path, layer.alpha, layer.A.tolist(), layer.B.tolist()) for path, layer in sorted(adapter.items())]


@pytest.mark.parametrize("step", ["save_file", "write_text", "replace 1", "replace 2"])
def test_a_failure_in_the_middle_leaves_the_old_adapter_or_none(saved, step, monkeypatch):
    old, calls = contents(saved), []
    real = os.replace

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    def replace(*args):
        calls.append(args)
        return fail() if len(calls) == int(step[-1]) else real(*args)

    if step == "save_file":
        monkeypatch.setattr(adapter_files, "save_file", fail)
    elif step == "write_text":
        monkeypatch.setattr("pathlib.Path.write_text", fail)
    else:
        monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model := second_adapter(), saved)
    assert contents(saved) == (old if step in ("save_file", "write_text") else None)
    assert not list(saved.glob("*.part"))
    monkeypatch.undo()
    save_adapter(model, saved)
    assert contents(saved)[0][1] == 24


def test_at_no_moment_of_writing_is_a_mixture_read(saved, monkeypatch):
    """Read before, and after each step that changes the directory: no config, the new weights, the new config."""
    model, seen = second_adapter(), [contents(saved)]
    old = seen[0]

    def spied(function, *args, **kwargs):
        function(*args, **kwargs)
        seen.append(contents(saved))

    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, partial(spied, getattr(os, name)))
    save_adapter(model, saved)
    monkeypatch.undo()
    new = contents(saved)
    assert len(seen) == 4 and None in seen and new not in (None, old)
    assert all(what in (None, old, new) for what in seen)


def test_an_adapter_rewritten_while_it_is_read_is_not_a_mixture(saved, monkeypatch):
    real, model = adapter_files._read_tensors, second_adapter()

    def rewrite_first(path):
        monkeypatch.undo()
        save_adapter(model, saved)
        return real(path)

    monkeypatch.setattr(adapter_files, "_read_tensors", rewrite_first)
    with pytest.raises(AdapterError, match="written anew"):
        load_adapter(MLP(), saved)
    load_adapter(MLP(), saved)


@pytest.mark.parametrize("value", [NAN, INF])
def test_an_adapter_that_is_not_finite_is_not_written(saved, value):
    old, model = contents(saved), second_adapter()
    with torch.no_grad():
        model.fc3.lora_B[0, 0] = value
    with pytest.raises(ValueError, match="lora_B of layer 'fc3' holds NaN or Inf"):
        save_adapter(model, saved)
    with pytest.raises(ValueError):
        save_adapter(model, saved / "new")
    assert contents(saved) == old and not (saved / "new").exists()
    assert not torch.isfinite(model.fc3.lora_B).all()
