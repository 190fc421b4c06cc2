"""LoRA's training step and inference, against PEFT, loralib, the frozen base and full fine-tuning."""

import copy
import warnings

import loralib
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import interleaved, markdown, ratio
from lora_lab.lora import inject, merge
from lora_lab.models import MLP

R, ALPHA = 8, 16


class DenseSum(nn.Linear):
    """LoRA as W + s B A, formed anew in each forward pass."""

    def __init__(self, base):
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(R, base.in_features) / base.in_features ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, R))

    def forward(self, x):
        return F.linear(x, self.weight + ALPHA / R * (self.lora_B @ self.lora_A), self.bias)


def _loralib(base):
    layer = loralib.Linear(base.in_features, base.out_features, r=R, lora_alpha=ALPHA, merge_weights=False)
    layer.weight, layer.bias = base.weight.requires_grad_(False), base.bias.requires_grad_(False)
    return layer


def _replaced(model, make):
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(path, make(layer))
    return model


def _ours(model):
    model = copy.deepcopy(model)
    inject(model, "all-linear", r=R, alpha=ALPHA)
    return model


def _peft(model):
    from peft import LoraConfig, get_peft_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model), LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear"))


def _cases():
    """Name, model, input x, number of products per row and layer shapes. x wants a gradient where the layer stands
    inside a network."""
    yield "MLP, batch 128", MLP(), torch.randn(128, 784), [(512, 784), (256, 512), (10, 256)]
    for name, width, rows in (("1024 x 1024, batch 32", 1024, (32,)), ("768 x 768, input (8, 64, 768)", 768, (8, 64))):
        x = torch.randn(*rows, width, requires_grad=True)
        yield name, nn.Sequential(nn.Linear(width, width)), x, [(width, width)]


def _step(model, x):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def step():
        loss = model(x).square().mean()
        if optimizer:
            optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        if optimizer:
            optimizer.step()

    return step


def _infer(model, x):
    model = model.eval()

    def forward():
        with torch.no_grad():
            model(x)

    return forward


def _flops(shapes, rows: int, inner: bool) -> float:
    """FLOPs of a LoRA step over those of the frozen base's forward and the gradient at the inputs."""
    base = sum(2 * rows * m * n for m, n in shapes)
    to_inputs = sum(2 * rows * m * n for m, n in (shapes if inner else shapes[1:]))
    thin = sum(2 * rows * R * (m + n) for m, n in shapes)  # forward; the backward is twice that (inputs and weights)
    return (base + to_inputs + 3 * thin) / (base + to_inputs)


def run() -> str:
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, base, x, shapes in _cases():
            models = {"ours": _ours(base), "PEFT": _peft(base), "loralib": _replaced(base, _loralib),
                      "W + s B A": _replaced(base, DenseSum), "full": copy.deepcopy(base),
                      "frozen": copy.deepcopy(base).requires_grad_(False)}
            rounds = 400 if x.numel() < 200_000 else 80  # short ones vary more
            step = interleaved({k: _step(m.train(), x) for k, m in models.items()}, rounds)
            infer = interleaved({k: _infer(m, x.detach()) for k, m in models.items()} |
                                {"merged": _infer(merge(models["ours"]), x.detach())}, 2 * rounds)
            flops = _flops(shapes, x.shape[:-1].numel(), x.requires_grad)
            rows.append([name, str(threads), ratio(step["ours"], step["PEFT"]), ratio(step["ours"], step["loralib"]),
                         ratio(step["ours"], step["frozen"]), f"{flops:.2f}", ratio(step["ours"], step["W + s B A"]),
                         ratio(step["ours"], step["full"]), ratio(infer["ours"], infer["PEFT"]),
                         ratio(infer["ours"], infer["loralib"]), ratio(infer["merged"], infer["frozen"])])
    torch.set_num_threads(2)
    header = ["case", "threads", "step / PEFT", "/ loralib", "/ frozen base", "FLOPs", "/ W + s B A", "/ full",
              "unmerged inference / PEFT", "/ loralib", "merged / base"]
    return markdown(header, rows) + "\n\n" + _memory()


def _memory() -> str:
    def sizes(model):
        _step(model, torch.randn(128, 784))()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
        return sum(p.grad.nbytes for p in parameters), sum(t.nbytes for t in state)

    lora, full = sizes(_ours(MLP())), sizes(MLP())
    return markdown(["MLP, r = 8 on all layers", "gradients, bytes", "optimizer state, bytes"],
                    [["full fine-tuning", *(f"{b:,}" for b in full)], ["LoRA", *(f"{b:,}" for b in lora)],
                     ["ratio", *(f"{f / b:.1f}" for f, b in zip(full, lora, strict=True))]])
