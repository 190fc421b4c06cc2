"""The course's model, its pretrained base, and what a model's parameters count up to."""

from contextlib import suppress
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lora_lab import cache
from lora_lab.data import OLD, mnist
from lora_lab.lora import lora_parameters
from lora_lab.progress import progress
from lora_lab.training import fit


class MLP(nn.Module):
    """784-512-256-10, 535,818 parameters: three linear layers with ReLU between. Takes (n, 784) or (n, 1, 28, 28)."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(784, 512)
        self.fc2 = nn.Linear(512, 256)
        self.fc3 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x.flatten(1)))  # (n, 512)
        h = torch.relu(self.fc2(h))  # (n, 256)
        return self.fc3(h)  # (n, 10)


class Counts(NamedTuple):
    """Numbers of parameters: all of them, those that are trained, those that are LoRA's A and B."""

    total: int
    trainable: int
    lora: int


def count_parameters(model: nn.Module) -> Counts:
    """Parameters of a model; a tied one counts once. Shapes are enough: the model may be on the meta device."""
    groups = model.parameters(), (p for p in model.parameters() if p.requires_grad), lora_parameters(model)
    return Counts(*(sum(p.numel() for p in group) for group in groups))


def base_model(seed: int = 0, epochs: float = 3, batch_size: int = 256, lr: float = 3e-3) -> MLP:
    """An MLP trained on the digits 0-7 only: it has never met an 8 or a 9, yet has ten outputs.

    Trained once for each choice of settings (a few seconds), then kept in the cache folder as safetensors. A file that
    is not whole is not trusted: the model is trained again. Each call returns a new model, in evaluation mode.
    """
    settings = dict(seed=seed, epochs=epochs, batch_size=batch_size, lr=lr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MLP()
    start = f"base-{cache.key(settings, str(model))}-"  # the file's name goes on with a digest of its content
    for file in cache.folder().glob(start + "*"):
        content = b""
        with suppress(OSError):  # gone meanwhile, or not ours to read
            content = file.read_bytes()
        if file.name == f"{start}{cache.digest(content)}.safetensors":
            model.load_state_dict(load(content))
            with progress(total=1, desc="base model") as bar:
                bar.note = "base model: from the cache"
                bar.update()
            return model.eval()
    fit(model, mnist()[0].only(OLD), label="base model", **settings)
    content = save(model.state_dict())
    with suppress(OSError):  # a full disk: the model is here all the same
        cache.keep(cache.folder() / f"{start}{cache.digest(content)}.safetensors", content)
    return model.eval()
