"""What every worker of a sweep needs, loaded once by the process that all of them are forked from (on Linux)."""

from contextlib import suppress

import torch
import torch._dynamo  # noqa: F401  (the first optimizer would load it)

from lora_lab import data, sweep  # noqa: F401

torch.set_num_threads(1)  # a process that has threads should not be forked
with suppress(data.DataError):  # a run that wants the data says so itself
    data._pixels("train"), data._pixels("t10k")
