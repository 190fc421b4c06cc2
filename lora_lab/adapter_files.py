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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_lab.cache import written_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NARROWING = {"layers_to_transform", "layers_pattern"}  # PEFT's ways to adapt fewer than the targets
# PEFT's settings that are read here, and those that say nothing about what a finished adapter computes
ACCEPTED = NARROWING | {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "lora_dropout", "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "init_lora_weights",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
BASE_UNCHANGED = {"true", "false", "gaussian", "orthogonal", "eva", "mica"}  # starts that leave the base as it was


class AdapterError(ValueError):
    """An adapter that cannot be used as it is; the message names what is wrong with it."""


class LayerWeights(NamedTuple):
    """One layer's adapter: A (r, in), B (out, r), and what makes s = alpha / r, or alpha / sqrt(r) with rslora."""

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool
    dropout: float


def write(directory, layers: dict[str, LayerWeights], modules) -> None:
    """Write both files for the adapted `layers`, by path; `modules` are the paths of all modules of their model.

    Raises ValueError, with the directory as it was, if a value is not finite."""
    directory, tensors = Path(directory), {}
    for path, layer in layers.items():
        for letter, tensor in (("A", layer.A), ("B", layer.B)):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"lora_{letter} of layer {path!r} holds NaN or Inf: not saved. Did training diverge?")
            tensors[_name(path, letter)] = tensor.detach().cpu().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / CONFIG
    # The last to be opened is the first to be in place: no config, then the new weights, then the new config.
    with written_whole(config) as new_config, written_whole(directory / WEIGHTS) as new_weights:
        save_file(tensors, new_weights, {"format": "pt"})
        new_config.write_text(json.dumps(_config(layers, modules), indent=2, sort_keys=True) + "\n")
        config.unlink(missing_ok=True)  # without a config nobody reads half of each


def read(directory, shapes: dict[str, tuple[int, int]]) -> dict[str, LayerWeights]:
    """Read the adapter for a model whose linear layers have weights of these `shapes`: path to (out, in).

    Raises FileNotFoundError if a file is missing, and AdapterError, which names it, for any tensor or setting that is
    missing, too many, misshapen, not finite or not plain LoRA of these layers. (Where a setting of PEFT's leaves some
    targets out, the tensors themselves say which: one layer's missing altogether is then not noticed.)"""
    config_file, weights_file = Path(directory, CONFIG), Path(directory, WEIGHTS)
    for file in (config_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(f"{directory} has no {file.name}: not an adapter, or its saving was interrupted")
    text = config_file.read_bytes()
    config, tensors = _read_config(text, config_file), _read_tensors(weights_file)
    if config_file.read_bytes() != text:
        raise AdapterError(f"{directory} was written anew while it was read: read it again")
    try:
        meant = {path: (_pattern(config, "rank_pattern", path, config["r"]),
                        _pattern(config, "alpha_pattern", path, config["lora_alpha"]))
                 for path in shapes if _is_target(config["target_modules"], path)
                 and not _is_target(config.get("exclude_modules") or (), path)}
    except (AttributeError, TypeError, re.error) as error:
        raise AdapterError(f"{config_file}: target_modules, exclude_modules, rank_pattern or alpha_pattern cannot be "
                           f"read: {error}") from error
    if any(config.get(name) not in (None, []) for name in NARROWING):  # then the tensors say which layers are left
        meant = {path: both for path, both in meant.items() if _name(path, "A") in tensors}
    layers = {}
    for path, (r, alpha) in meant.items():
        out_features, in_features = shapes[path]
        A, B = (_take(tensors, _name(path, letter), shape)
                for letter, shape in (("A", (r, in_features)), ("B", (out_features, r))))
        layers[path] = LayerWeights(A, B, alpha, bool(config.get("use_rslora")), config.get("lora_dropout") or 0.0)
    if tensors or not layers:
        raise AdapterError(f"{weights_file} holds {', '.join(map(repr, tensors)) or 'nothing'}, which is no lora_A or "
                           "lora_B of a layer that the config's target_modules mean. Linear layers of the model: "
                           f"{', '.join(map(repr, shapes)) or 'none'}; meant: {', '.join(layers) or 'none'}")
    return layers


def _name(path: str, letter: str) -> str:
    return f"base_model.model.{path}.lora_{letter}.weight"


def _config(layers: dict[str, LayerWeights], modules) -> dict:
    """Every setting that PEFT needs to rebuild the adapter; the commonest r and alpha, and patterns for the others."""
    rslora, both, paths = all(layer.rslora for layer in layers.values()), {}, sorted(layers)
    for path, (A, _, alpha, root, _) in layers.items():
        both[path] = len(A), alpha * math.sqrt(len(A)) if root and not rslora else alpha
    r, alpha = Counter(both.values()).most_common(1)[0][0]
    # PEFT takes a listed name for the end of a path too; where that would reach another module, it gets an expression
    safe = not any(_is_target(paths, other) for other in set(modules) - set(paths))
    return dict(peft_type="LORA", base_model_name_or_path=None, inference_mode=True, r=r, lora_alpha=alpha, bias="none",
                lora_dropout=max(layer.dropout for layer in layers.values()),  # PEFT knows one for all layers
                use_rslora=rslora, target_modules=paths if safe else "|".join(map(re.escape, paths)),
                rank_pattern={f"^{re.escape(p)}": n for p, (n, _) in both.items() if n != r},
                alpha_pattern={f"^{re.escape(p)}": a for p, (_, a) in both.items() if a != alpha})


def _read_config(text: bytes, path: Path) -> dict:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is not LORA, so this is not a LoRA adapter")
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise AdapterError(f"{path} does not say {name}")
    if str(start := config.get("init_lora_weights", True)).lower() not in BASE_UNCHANGED:
        raise AdapterError(f"{path}: init_lora_weights = {start!r} changes the base's weights too. Save it from PEFT "
                           "converted to plain LoRA (path_initial_model_for_weight_conversion).")
    for name, value in config.items():
        if value and name not in ACCEPTED and (name, value) != ("bias", "none"):
            raise AdapterError(f"{path}: {name} = {value!r} goes beyond plain LoRA on linear layers, which is all that "
                               "is read here")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged or cut off: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{path}: {name} holds something that is not a finite number")
    return tensors


def _take(tensors: dict[str, Tensor], name: str, shape: tuple) -> Tensor:
    """Take out one tensor, of this shape by the config's r and the model's layer."""
    tensor = tensors.pop(name, None)
    if tensor is None or tensor.shape != shape:
        found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise AdapterError(f"{name} {found}; by the config's r and target_modules and the model, {shape} was expected")
    return tensor


def _pattern(config: dict, setting: str, path: str, default):
    """PEFT's rule: the first key that, as a regular expression, matches the path or its end after a dot."""
    patterns = (config.get(setting) or {}).items()
    return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", path)), default)


def _is_target(target_modules: list[str] | str, path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or their ends at a dot."""
    if isinstance(target_modules, str):
        return target_modules.lower() == "all-linear" or re.fullmatch(target_modules, path) is not None
    return path in target_modules or path.endswith(tuple(f".{name}" for name in target_modules))
