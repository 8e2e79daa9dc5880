"""timm imports torchvision, whose wheels on PyPI are made for the CUDA builds of torch."""

import torch

if torch.version.cuda is None:
    # Torchvision goes on without its compiled part then, and yet looks for two of its operators.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
