"""Every model by name, for torch.hub: torch.hub.load(FOLDER_OR_REPOSITORY, "levit128", attention="castling").

    import torch
    model = torch.hub.load("path/to/this/folder", "levit128", source="local", num_classes=10)

Arguments are those of models.build_model. There are no pretrained weights.
"""

import functools

from attention import LinearAngularAttention  # noqa: F401
from models import build_model, list_models

dependencies = ["torch", "torchvision", "einops"]
globals().update({name: functools.partial(build_model, name) for name in list_models()})
