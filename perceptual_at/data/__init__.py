"""Images and labels: digits that need no download, and the papers' data sets.

All images are served in [0, 1] and not normalised: the model normalises.
"""

from perceptual_at.data.archives import npz_images
from perceptual_at.data.cifar import CIFAR10_MEAN, CIFAR10_STD, cifar10, cifar100
from perceptual_at.data.folders import image_folder, tiny_imagenet
from perceptual_at.data.mixing import mixed_rows
from perceptual_at.data.segmentation import digit_canvases, mask_folder
from perceptual_at.data.sklearn_digits import digits
from perceptual_at.data.streams import ImageFiles, stream_folder, stream_tars
from perceptual_at.data.tensors import TensorImages, channel_statistics, hold_out, loader

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "ImageFiles",
    "TensorImages",
    "channel_statistics",
    "cifar10",
    "cifar100",
    "digit_canvases",
    "digits",
    "hold_out",
    "image_folder",
    "loader",
    "mask_folder",
    "mixed_rows",
    "npz_images",
    "stream_folder",
    "stream_tars",
    "tiny_imagenet",
]
