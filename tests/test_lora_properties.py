"""What holds of LoRA whatever the shape, rank, scale and dtype: hypothesis chooses them, the same ones in every run."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lab.lora import LoRALinear, _weights, disabled, inject, lora_parameters, merge
from lora_lab.models import count_parameters

fixed = settings(derandomize=True, deadline=None, max_examples=60, database=None)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = st.integers(1, 24)
INITS = st.sampled_from(["gaussian", "kaiming", "pissa", "svd"])


@st.composite
def layers(draw, dtypes=FLOATS, inits=INITS, train=True, sizes=SIZES):
    """A LoRALinear with any sizes, rank, alpha, scaling, start, bias and dtype; as if trained, or at its start."""
    in_features, out_features = draw(sizes), draw(sizes)
    torch.manual_seed(draw(st.integers(0, 2**32)))
    base = nn.Linear(in_features, out_features, draw(st.booleans()), dtype=draw(st.sampled_from(dtypes)))
    r, alpha = draw(st.integers(1, min(in_features, out_features))), draw(st.sampled_from([0.5, 1, 3, 8, 32]))
    layer = LoRALinear(base, r, alpha, init=draw(inits), rslora=draw(st.booleans()))
    with torch.no_grad():
        for p in lora_parameters(layer) if train else ():
            p.add_(torch.randn_like(p) / math.sqrt(p.shape[1]))
    return layer


def inputs(layer, batch=3):
    return torch.randn(batch, layer.in_features, dtype=layer.weight.dtype)


@fixed
@given(layers(dtypes=[torch.float64]))
def test_rank_of_the_update_is_at_most_r(layer):
    most = 2 * layer.r if layer.subtracts_start else layer.r  # B A - B0 A0
    singular = torch.linalg.svdvals(layer.delta_weight())
    assert (singular[most:] <= 1e-13 * singular[0]).all()
    assert torch.linalg.matrix_rank(layer.scaling * layer.lora_B @ layer.lora_A) <= layer.r


@fixed
@given(layers())
def test_merged_is_unmerged_up_to_the_rounding_of_the_dtype(layer):
    """Base, update and sum are rounded to the dtype here, weight and output there: five times half an eps. The sums
    themselves round in at least float32, once for each of their terms."""
    x = inputs(layer)
    a, b = layer(x).double(), merge(layer)(x).double()
    W, parts = layer.weight.double().abs(), [(layer.lora_A, layer.lora_B)]
    if layer.subtracts_start:
        parts.append((layer.start_A, layer.start_B))
    size = W + layer.scaling * sum(B.double().abs() @ A.double().abs() for A, B in parts)
    size = x.double().abs() @ size.T + (0 if layer.bias is None else layer.bias.double().abs())
    wide = torch.finfo(torch.promote_types(layer.weight.dtype, torch.float32)).eps
    terms = layer.in_features + 2 * layer.r + 4
    allowed = (5 / 2 * torch.finfo(layer.weight.dtype).eps + terms * wide) * size
    tiny = torch.finfo(layer.weight.dtype).tiny
    assert ((a - b).abs() <= allowed + tiny * terms).all()


@fixed
@given(layers(dtypes=[torch.float64]), st.integers(1, 5))
def test_gradients_are_those_of_the_dense_weight(layer, batch):
    x = inputs(layer, batch)
    xa, xb = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(xa).sin().sum().backward()
    W = (layer.weight + layer.delta_weight()).detach().requires_grad_()
    F.linear(xb, W, layer.bias).sin().sum().backward()
    s, A, B = layer.scaling, layer.lora_A.detach(), layer.lora_B.detach()
    size = s * W.grad.norm() * max(A.norm(), B.norm(), 1) + 1
    pairs = (xa.grad, xb.grad), (layer.lora_A.grad, s * B.T @ W.grad), (layer.lora_B.grad, s * W.grad @ A.T)
    for mine, reference in pairs:
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12 * size.item())
    assert layer.weight.grad is None and (layer.bias is None or layer.bias.grad is None)


@fixed
@given(layers(inits=st.sampled_from(["gaussian", "kaiming"]), train=False))
def test_at_the_start_only_B_has_a_gradient(layer):
    x = inputs(layer)
    layer(x).double().sum().backward()
    assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()


@fixed
@given(layers(inits=st.sampled_from(["gaussian", "kaiming", "pissa"]), train=False))
def test_at_the_start_the_output_is_the_output_of_the_base(layer):
    x = inputs(layer)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(merge(layer).weight, layer.weight)


@fixed
@given(layers())
def test_disabled_is_the_base_bit_for_bit(layer):
    x = inputs(layer)
    with disabled(layer):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@fixed
@given(layers(dtypes=[torch.float64], inits=st.just("pissa")))
def test_the_file_form_of_pissa_says_the_same(layer):
    A, B, alpha, rslora, _ = _weights(layer)
    plain = LoRALinear(merge(nn.Sequential(layer)).get_submodule("0"), len(A), alpha, init=(A, B), rslora=rslora)
    assert math.isclose(plain.scaling, layer.scaling, rel_tol=1e-15) and len(A) == 2 * layer.r
    size = layer.scaling * (layer.lora_B.norm() * layer.lora_A.norm() + layer.start_B.norm() * layer.start_A.norm())
    torch.testing.assert_close(plain.delta_weight(), layer.delta_weight(), rtol=0, atol=1e-13 * size.item())


@fixed
@given(st.lists(SIZES, min_size=2, max_size=6), st.data())
def test_counts_are_r_times_in_plus_out(sizes, data):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False)))
    base = count_parameters(model).total
    chosen = data.draw(st.sets(st.integers(0, len(model) - 1), min_size=1))
    ranks = {str(i): data.draw(st.integers(1, min(sizes[i], sizes[i + 1]))) for i in sorted(chosen)}
    assert inject(model, list(ranks), r=ranks, alpha=1) == list(ranks)
    lora = sum(r * (sizes[int(i)] + sizes[int(i) + 1]) for i, r in ranks.items())
    assert count_parameters(model) == (base + lora, lora, lora)
    assert base == sum(i * o + o for i, o in zip(sizes, sizes[1:], strict=False))


@fixed
@given(layers(dtypes=[torch.float64], inits=st.sampled_from(["gaussian", "kaiming"]), train=False), st.floats(0.25, 4))
def test_alpha_and_the_size_of_A_are_one_setting(layer, factor):
    """(alpha / q, q A) is the same function."""
    with torch.no_grad():
        layer.lora_B.normal_()
    twin = LoRALinear(nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64), layer.r,
                      layer.alpha / factor, init=(layer.lora_A.detach() * factor, layer.lora_B.detach()),
                      rslora=layer.rslora)
    torch.testing.assert_close(twin.delta_weight(), layer.delta_weight(), rtol=1e-12, atol=1e-12)
