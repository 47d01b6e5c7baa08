"""Lets the index's torchvision, a CUDA build, import beside a CPU torch: vLLM's processors need it.

``make test-vllm`` installs this file in the environment of vLLM on a CPU. torchvision's own library cannot be loaded
there, so the two operators that the import asks for are declared. Image processors do not call them.
"""

import sys
from importlib.abc import MetaPathFinder


class _Declare(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global library  # its declarations live as long as this object
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Declare())
