"""Every model and the attention block by name, for torch.hub.

    torch.hub.load("path/to/this/folder", "levit128", source="local", num_classes=10)
    torch.hub.load("path/to/this/folder", "LinearAngularAttention", source="local", dim=192, num_heads=3)

A model takes the arguments of `models.build_model`. There are no pretrained weights.
"""

import functools

from attention import LinearAngularAttention  # noqa: F401
from models import build_model, list_models

dependencies = ["torch", "torchvision", "einops"]
globals().update({name: functools.partial(build_model, name) for name in list_models()})
