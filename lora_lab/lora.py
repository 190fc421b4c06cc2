"""LoRA: train a low-rank update of a frozen linear layer (Hu et al. 2021, arXiv 2106.09685).

    inject(model, ["fc3"], r=4, alpha=8)    the chosen nn.Linear layers become LoRALinear, all else is frozen
    ... train lora_parameters(model) ...
    with disabled(model): ...               the base model, bit for bit
    merge(model)                            a new model of plain layers, W + s B A
    save_adapter(model, directory)          a few kB that PEFT reads as well
    load_adapter(model, directory)          puts it on the model in place of the adapter that is there
    remove(model)                           the base model again

One convention, PyTorch's: weight (out, in), A (r, in), B (out, r), x (..., in). Read LoRALinear.forward and
delta_weight first: they are LoRA. The rest is care.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab import adapter_files
from lora_lab.adapter_files import AdapterError, LayerWeights
from lora_lab.linalg import split

INITS = ("gaussian", "kaiming", "pissa", "svd")


class LoRALinear(nn.Linear):
    """h = W x + b + s B A dropout(x), with s = alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732).

    W (out, in) and b (out,) are the base layer's own parameters, shared and frozen; A (r, in) and B (out, r) are
    trained. A 16-bit base gets A and B in float32, and h comes back in the base's dtype. `init` is the start of A, B:
    "gaussian": A ~ N(0, 1/in), B = 0: h starts as the base's. The paper's start (section 4.1), which leaves sigma open;
                PEFT's init of this name has sigma = 1/r.
    "kaiming":  A uniform within 1/sqrt(in), B = 0: what loralib and PEFT do.
    "pissa":    s B A is the best rank-r part of W, and that start is subtracted again (arXiv 2404.02948): training
                acts on the top of W, W itself stays as it was, and h starts as the base's.
    "svd":      B A is the best rank-r part of W and nothing is subtracted. This CHANGES the model before training;
                some tutorials do it; kept to compare.
    (A, B):     these tensors, as from a file; only here may r be above min(in, out).
    Raises ValueError or TypeError for an r, alpha, dropout or init that cannot work, or a base that is not nn.Linear.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, init="gaussian",
                 rslora: bool = False):
        if type(base) is not nn.Linear:
            raise TypeError(f"LoRALinear adapts an nn.Linear, not a {type(base).__name__}")
        _check(base, r, alpha, dropout, init)
        super().__init__(base.in_features, base.out_features, device="meta")  # meta: no memory, no random numbers
        base.requires_grad_(False)
        self.weight, self.bias = base.weight, base.bias
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scaling = alpha / (math.sqrt(r) if rslora else r)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        A, B = _start(self.weight, r, init, self.scaling)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.subtracts_start = init == "pissa"
        if self.subtracts_start:
            self.register_buffer("start_A", A.clone())
            self.register_buffer("start_B", B.clone())
        self.train(base.training)

    enabled = True  # see `disabled`

    def forward(self, x: Tensor) -> Tensor:  # (..., in)
        h = F.linear(x, self.weight, self.bias)  # (..., out)
        if not self.enabled:
            return h
        x = self.dropout(x.to(self.lora_A.dtype))  # (..., in)
        update = F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)  # (..., in) -> (..., r) -> (..., out)
        if self.subtracts_start:
            update = update - F.linear(F.linear(x, self.start_A) * self.scaling, self.start_B)
        return (h + update).to(h.dtype)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight: s B A, (out, in), in at least float32."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        delta = self.lora_B.to(wide) @ self.lora_A.to(wide)  # (out, r) @ (r, in) -> (out, in)
        if self.subtracts_start:
            delta = delta - self.start_B.to(wide) @ self.start_A.to(wide)
        return delta * self.scaling

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}{', rslora=True' * self.rslora}"


def inject(model: nn.Module, target_modules, r, alpha, dropout: float = 0.0, init="gaussian",
           rslora: bool = False) -> list[str]:
    """Turn linear layers of `model` into LoRALinear, in place, and freeze everything but their A and B.

    `target_modules`: "all-linear", or names: the exact path of a layer, or its end from a dot on ("q_proj" means every
    layer whose path is q_proj or ends in .q_proj). `r` and `alpha`: a number, or a dict from such names to numbers.
    A and B are drawn from torch's global random state. Returns the adapted paths.
    Raises ValueError, with the model unchanged, if a name fits no nn.Linear, a dict leaves a layer out or names one too
    many, the model has LoRA layers already, or a setting cannot work.
    """
    if present := _lora_layers(model):
        raise ValueError(f"the model has LoRA layers already ({', '.join(present)}): a second injection would stack "
                         "them. Use remove(model) or merge(model) first, or load_adapter to exchange the adapter.")
    layers = _find(model, target_modules)
    ranks, alphas = _per_layer("r", r, layers), _per_layer("alpha", alpha, layers)
    for path, layer in layers.items():
        _check(layer, ranks[path], alphas[path], dropout, init, path)
    _check_called(model, layers.values())
    adapted = {p: LoRALinear(m, ranks[p], alphas[p], dropout, init, rslora) for p, m in layers.items()}
    model.requires_grad_(False).zero_grad()  # an old gradient would still move it
    for path, layer in layers.items():
        _become(layer, adapted[path])
    return list(layers)


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """A and B of every LoRA layer: what the optimizer needs."""
    return (p for layer in _lora_layers(model).values() for p in (layer.lora_A, layer.lora_B))


@contextmanager
def disabled(model: nn.Module):
    """Inside the block the adapter that is there is switched off: its layers compute what the base computes, bit for
    bit. (One that is loaded inside the block is on; a copy made there stays off.)"""
    layers = [layer for layer in _lora_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            vars(layer).pop("enabled", None)  # it may have been removed meanwhile


def merge(model: nn.Module) -> nn.Module:
    """A new model whose LoRA layers are plain nn.Linear with weight W + s B A; the given model is not touched.

    The sum is formed in at least float32 and rounded once to the base's dtype. A weight tied to another layer (say an
    embedding) is untied in the copy, so that only the adapted layer changes. Without LoRA layers: a plain copy.
    Raises ValueError, naming the layer, if a merged weight is not finite.
    """
    merged = copy.deepcopy(model)
    for path, layer in _lora_layers(merged).items():
        weight = (layer.weight + layer.delta_weight()).detach().to(layer.weight.dtype)  # (out, in)
        if not torch.isfinite(weight).all():
            raise ValueError(f"the merged weight of layer {path!r} holds NaN or Inf: not merged. Did training diverge?")
        layer.weight = nn.Parameter(weight, requires_grad=False)
    remove(merged)
    return merged


def remove(model: nn.Module) -> None:
    """Take the adapter off, in place: the layers are the base's nn.Linear again, bit for bit (and still frozen)."""
    for layer in _lora_layers(model).values():
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        _become(layer, plain.train(layer.training))


def save_adapter(model: nn.Module, directory) -> None:
    """Write the adapter as adapter_model.safetensors and adapter_config.json, the format of PEFT, which loads it.

    A "pissa" layer is written as the plain LoRA of rank 2r that says the same.
    While one process writes, a reader sees the old adapter, none, or the new one, never a mixture.
    Raises ValueError if the model has no LoRA layers or a value is not finite; what was in the directory stays."""
    layers = {path: _weights(layer) for path, layer in _lora_layers(model).items()}
    if not layers:
        raise ValueError("the model has no LoRA layers: inject or load an adapter first")
    adapter_files.write(directory, layers, [path for path, _ in model.named_modules()])


def load_adapter(model: nn.Module, directory) -> list[str]:
    """Put an adapter written by `save_adapter` or by PEFT on the model's linear layers, in place, instead of the one
    that it may have, and freeze all else. Returns the adapted paths.

    Raises FileNotFoundError if a file is missing, and AdapterError, which names it, for anything that is missing,
    extra, misshapen, not finite or not plain LoRA. The model is then unchanged."""
    linears = {path: m for path, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, LoRALinear)}
    adapter = adapter_files.read(directory, {path: tuple(m.weight.shape) for path, m in linears.items()})
    try:
        for path, (A, B, alpha, _, dropout) in adapter.items():
            _check(linears[path], len(A), alpha, dropout, (A, B), path)
        _check_called(model, [linears[path] for path in adapter])
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterError(f"the adapter in {directory} cannot be used: {error}") from error
    remove(model)
    model.requires_grad_(False).zero_grad()
    for path, (A, B, alpha, rslora, dropout) in adapter.items():
        _become(linears[path], LoRALinear(linears[path], len(A), alpha, dropout, (A, B), rslora))
    return list(adapter)


def _weights(layer: LoRALinear) -> LayerWeights:
    """What a file says of a layer; of "pissa" [A; A0] and [B, -B0], with alpha so that s stays."""
    A, B, alpha = layer.lora_A, layer.lora_B, layer.alpha
    if layer.subtracts_start:
        A, B = torch.cat([A, layer.start_A]), torch.cat([B, -layer.start_B], dim=1)  # (2r, in), (out, 2r)
        alpha = alpha * (math.sqrt(2) if layer.rslora else 2)
    return LayerWeights(A, B, alpha, layer.rslora, getattr(layer.dropout, "p", 0.0))


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def _fitting(name: str, paths) -> list[str]:
    """The paths that a name means: itself, or those that end in it after a dot."""
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def _find(model: nn.Module, target_modules) -> dict[str, nn.Linear]:
    """The layers that the names mean, by path, in the model's order; one that is used twice, once."""
    linears = {p: m for p, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    if target_modules is None:
        raise TypeError('target_modules is None: give names of linear layers, or "all-linear"')
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if names == ["all-linear"]:
        names = list(linears)
    if not names:
        raise ValueError("no layer to adapt: target_modules is empty, or the model has no nn.Linear")
    for name in names:
        if not _fitting(name, linears):
            other = [type(m).__name__ for p, m in model.named_modules() if p and _fitting(name, [p])]
            why = f"is a {other[0]}, and only nn.Linear can be adapted" if other else "fits no layer of the model"
            raise ValueError(f"target {name!r} {why}. Linear layers here: {', '.join(map(repr, linears)) or 'none'}")
    meant = {path for name in names for path in _fitting(name, linears)}
    first = {layer: path for path, layer in reversed(linears.items()) if path in meant}
    return {path: layer for path, layer in linears.items() if first.get(layer) == path}


def _per_layer(setting: str, value, layers: dict) -> dict:
    """`value` for each layer; from a dict, by the exact path or else by the end of the path."""
    if not isinstance(value, dict):
        return dict.fromkeys(layers, value)
    chosen = {}
    for name in sorted(value, key=len):  # the longest is the most exact one
        if not (paths := _fitting(name, layers)):
            raise ValueError(f"{setting} names {name!r}, which is not among the adapted layers: {', '.join(layers)}")
        chosen |= dict.fromkeys(paths, value[name])
    if missing := [path for path in layers if path not in chosen]:
        raise ValueError(f"{setting} has no entry for layer {missing[0]!r}")
    return chosen


def _check(base: nn.Linear, r, alpha, dropout, init, path: str = "") -> None:
    where, largest = f" for layer {path!r}" if path else "", min(base.in_features, base.out_features)
    holds = {name for group in (base._parameters, base._buffers, base._modules) for name in group}
    extra = (holds - {"weight", "bias"}) | ({"forward"} & vars(base).keys())
    if type(base) is nn.Linear and extra:  # of weight_norm, of pruning, a mask, a forward that somebody put there
        raise ValueError(f"the linear layer{where} is more than W x + b: its {', '.join(sorted(extra))} would be lost")
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r = {r!r}{where}: it must be an int")
    if r < 1 or (r > largest and isinstance(init, str)):
        raise ValueError(f"r = {r}{where}: it must be from 1 to min(in, out) = {largest}, the highest rank it can have")
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} = {value!r}{where}: it must be an int or a float")
    if not abs(alpha) < 1e38 or (alpha <= 0 and init == "pissa"):
        raise ValueError(f"alpha = {alpha}{where}: it must be finite, and for pissa positive")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout}{where}: it is a probability, from 0 up to but not including 1")
    if isinstance(init, tuple):
        if [tuple(t.shape) for t in init] != [(r, base.in_features), (base.out_features, r)]:
            raise ValueError(f"A and B{where} must be ({r}, {base.in_features}) and ({base.out_features}, {r})")
    elif init not in INITS:
        raise ValueError(f"init = {init!r}{where} is not one of {', '.join(INITS)}")
    elif init in ("pissa", "svd") and not (base.weight.is_meta or torch.isfinite(base.weight).all()):
        raise ValueError(f"init = {init!r}{where}: the weight holds NaN or Inf, so it has no singular values")


def _check_called(model: nn.Module, layers) -> None:
    """torch's TransformerEncoderLayer, in eval mode, reads the weights of its layers and does not call them."""
    for path, module in model.named_modules():
        if (isinstance(module, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled()
                and any(child in layers for child in module.children())):
            raise ValueError(f"{path!r} is a TransformerEncoderLayer, which in eval mode leaves LoRA out silently. "
                             "Switch that off first: torch.backends.mha.set_fastpath_enabled(False)")


def _start(weight: Tensor, r: int, init, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) before training, on the base's device; float32 beside a 16-bit base."""
    out_features, in_features = weight.shape
    like = dict(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    if not isinstance(init, str):
        A, B = init
        return A.to(**like, copy=True), B.to(**like, copy=True)
    if init in ("svd", "pissa"):
        W = weight.detach().to(like["dtype"])
        return split(W / scaling if init == "pissa" else W, r)  # B A is W_r / s, or W_r
    if init == "gaussian":
        A = torch.randn(r, in_features, **like) / math.sqrt(in_features)
    else:
        A = torch.empty(r, in_features, **like).uniform_(-1, 1) / math.sqrt(in_features)
    return A, torch.zeros(out_features, r, **like)


def _become(module: nn.Module, other: nn.Module) -> None:
    """Make `module` what `other` is, where it stands. A layer used twice, or one that is the whole model, has no single
    parent in which it could be replaced; this way every reference to it, and every hook and mark on it, stays good."""
    gone = vars(other).keys() | {"r", "alpha", "rslora", "scaling", "subtracts_start", "enabled", "forward"}
    kept = {name: value for name, value in vars(module).items() if "hook" in name or name not in gone}
    module.__class__ = other.__class__
    module.__dict__ = {**vars(other), **kept}
