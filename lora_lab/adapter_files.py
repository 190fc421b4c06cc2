"""Adapters as files, in PEFT's format: adapter_config.json and adapter_model.safetensors.

The keys are base_model.model.<path of the layer>.lora_A.weight (r, in) and ...lora_B.weight (out, r). The format is
described in PEFT's developer guide on checkpoints. Nothing is unpickled, ever.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_lab.cache import written_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT's settings that say nothing about what a finished adapter computes
NEUTRAL = {"auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "init_lora_weights",
           "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
           "task_type"}
NARROWING = {"exclude_modules", "layers_to_transform", "layers_pattern"}  # PEFT's ways to adapt fewer than the targets
UNDERSTOOD = {"peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "bias"}
BASE_UNCHANGED = {"true", "false", "gaussian", "orthogonal", "eva", "mica"}  # starts that leave the base as it was


class AdapterError(ValueError):
    """An adapter that cannot be used as it is; the message names what is wrong with it."""


class LayerWeights(NamedTuple):
    """One layer's adapter: A (r, in), B (out, r), and what makes s = alpha / r, or alpha / sqrt(r) with rslora."""

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool = False
    dropout: float = 0.0


class Adapter(NamedTuple):
    """The weights by layer path, and the layers that are meant: names as in PEFT, or a regular expression."""

    layers: dict[str, LayerWeights]
    target_modules: list[str] | str


def write(adapter: Adapter, directory) -> None:
    """Write both files. Raises ValueError, with the directory as it was, if a value is not finite."""
    directory = Path(directory)
    tensors = {}
    for path, layer in adapter.layers.items():
        for letter, tensor in (("A", layer.A), ("B", layer.B)):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"lora_{letter} of layer {path!r} holds NaN or Inf: not saved. Did training diverge?")
            tensors[f"{PREFIX}{path}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / CONFIG
    # The last to be opened is the first to be in place: no config, then the new weights, then the new config.
    with written_whole(config) as new_config, written_whole(directory / WEIGHTS) as new_weights:
        save_file(tensors, new_weights, {"format": "pt"})
        new_config.write_text(json.dumps(_config(adapter), indent=2, sort_keys=True) + "\n")
        config.unlink(missing_ok=True)  # without a config nobody reads half of each


def read(directory) -> Adapter:
    """Read both files. Raises FileNotFoundError or AdapterError."""
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}: not an adapter, or its saving was interrupted")
    config_file = directory / CONFIG
    text = config_file.read_bytes()
    config, pairs = _config_from(text, config_file), _pairs(_read_tensors(directory / WEIGHTS))
    if config_file.read_bytes() != text:
        raise AdapterError(f"{directory} was written anew while it was read: read it again")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    layers = {}
    for path, (A, B) in pairs.items():
        r, alpha = _pattern(ranks, path, config["r"]), _pattern(alphas, path, config["lora_alpha"])
        if A.shape[0] != r or B.shape[1] != r:
            raise AdapterError(f"layer {path!r}: the config says r = {r}, but lora_A is {tuple(A.shape)} and lora_B "
                               f"{tuple(B.shape)}; expected ({r}, in) and (out, {r})")
        layers[path] = LayerWeights(A, B, alpha, bool(config.get("use_rslora")), config.get("lora_dropout") or 0.0)
    narrowed = any(config.get(name) is not None for name in NARROWING)  # then the file's own list counts
    return Adapter(layers, _expression(layers) if narrowed else config["target_modules"])


def targets(paths, modules) -> list[str] | str:
    """PEFT's target_modules for these `paths` among the `modules` of a model. PEFT takes a listed name for the end of
    a path too; where that would reach a module that is not meant, a regular expression."""
    paths = sorted(paths)
    return _expression(paths) if any(_is_target(paths, name) for name in set(modules) - set(paths)) else paths


def check_fit(adapter: Adapter, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise AdapterError unless the adapter is for exactly these linear layers: `shapes` maps path to (out, in)."""
    for path, layer in adapter.layers.items():
        if path not in shapes:
            raise AdapterError(f"the adapter is for a linear layer {path!r}, which the model does not have. "
                               f"It has: {', '.join(map(repr, shapes)) or 'none'}")
        found = (layer.B.shape[0], layer.A.shape[1])
        if found != shapes[path]:
            raise AdapterError(f"layer {path!r}: the adapter is made for a weight of shape {found} (out, in), the "
                               f"model's is {shapes[path]}")
    for path in shapes:
        if _is_target(adapter.target_modules, path) and path not in adapter.layers:
            raise AdapterError(f"the config means layer {path!r} as well, but the file has no lora_A and lora_B for it")
    for path in adapter.layers:
        if not _is_target(adapter.target_modules, path):
            raise AdapterError(f"the file has tensors for layer {path!r}, which the config's target_modules leave out")


def _config(adapter: Adapter) -> dict:
    """Every setting that PEFT needs to rebuild the adapter; the commonest r and alpha, and patterns for the others."""
    rslora = all(layer.rslora for layer in adapter.layers.values())

    def rank_and_alpha(layer: LayerWeights):
        r = len(layer.A)
        return r, layer.alpha * math.sqrt(r) if layer.rslora and not rslora else layer.alpha

    both = {path: rank_and_alpha(layer) for path, layer in adapter.layers.items()}
    r, alpha = Counter(both.values()).most_common(1)[0][0]
    return dict(peft_type="LORA", task_type=None, base_model_name_or_path=None, inference_mode=True,
                r=r, lora_alpha=alpha, lora_dropout=max(layer.dropout for layer in adapter.layers.values()),
                bias="none", fan_in_fan_out=False, use_rslora=rslora, use_dora=False, init_lora_weights=True,
                modules_to_save=None, target_modules=adapter.target_modules,
                rank_pattern={f"^{re.escape(p)}": n for p, (n, _) in both.items() if n != r},
                alpha_pattern={f"^{re.escape(p)}": a for p, (_, a) in both.items() if a != alpha})


def _config_from(text: bytes, path: Path) -> dict:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is not LORA, so this is not a LoRA adapter")
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise AdapterError(f"{path} does not say {name}")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias = {config['bias']!r}: trained biases are not part of plain LoRA")
    if str(start := config.get("init_lora_weights", True)).lower() not in BASE_UNCHANGED:
        raise AdapterError(f"{path}: init_lora_weights = {start!r} changes the base's weights too. Save it from PEFT "
                           "converted to plain LoRA (path_initial_model_for_weight_conversion).")
    for name, value in config.items():
        if value and name not in NEUTRAL | NARROWING | UNDERSTOOD:
            raise AdapterError(f"{path}: {name} = {value!r} goes beyond plain LoRA on linear layers, which is all that "
                               "is read here")
    try:
        for patterns in (config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}):
            for key in patterns.keys():
                re.compile(key)
        _is_target(config["target_modules"], "")
    except (AttributeError, TypeError, re.error) as error:
        raise AdapterError(f"{path}: target_modules, rank_pattern or alpha_pattern cannot be read: {error}") from error
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged or cut off: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} holds something that is not a finite number")
    return tensors


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path to (A, B). Raises AdapterError for any tensor that is neither, and for one without the other."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.*)\.lora_([AB])\.weight", name)
        if not match:
            raise AdapterError(f"unexpected tensor {name!r}: plain LoRA has {PREFIX}<layer>.lora_A.weight and "
                               ".lora_B.weight")
        if tensor.ndim != 2:
            raise AdapterError(f"{name} has shape {tuple(tensor.shape)}; a matrix was expected")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise AdapterError("the file holds no tensors at all")
    for path, found in halves.items():
        for letter in "AB":
            if letter not in found:
                raise AdapterError(f"lora_{letter} of layer {path!r} is missing from the file")
    return {path: (found["A"], found["B"]) for path, found in halves.items()}


def _pattern(patterns: dict, path: str, default):
    """PEFT's rule: the first key that, as a regular expression, matches the path or its end after a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _expression(paths) -> str:
    """A regular expression for exactly these paths."""
    return "|".join(re.escape(path) for path in sorted(paths))


def _is_target(target_modules: list[str] | str, path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or their ends at a dot."""
    if isinstance(target_modules, str):
        return target_modules.lower() == "all-linear" or re.fullmatch(target_modules, path) is not None
    return path in target_modules or path.endswith(tuple(f".{name}" for name in target_modules))
