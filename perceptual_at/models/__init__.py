"""The papers' networks for small images, a tiny one for digits, and what is built around them.

Every network takes images in [0, 1] and returns logits. Normalisation, where it is wanted, is a layer of the
model (`Normalize`, `normalized`), never a step of the data pipeline: attacks then work in pixel units.
The convolutional classifiers end in a global average pool, so 32 x 32 and 64 x 64 images (and others) enter the same
network. All networks take a `width`, so that narrow versions can be trained on a CPU.
"""

from perceptual_at.models.adapters import logits_of
from perceptual_at.models.batches import whole_batches
from perceptual_at.models.digits_cnn import DigitsCNN
from perceptual_at.models.folding import fold_classes
from perceptual_at.models.hypersphere import CosineLinear, with_cosine_logits
from perceptual_at.models.joined import from_joined, joined
from perceptual_at.models.normalization import Normalize, normalized
from perceptual_at.models.resnets import ResNet, preact_resnet18, resnet18, resnet26_bottleneck
from perceptual_at.models.taps import perceive_at, perception_taps, tap
from perceptual_at.models.trained_networks import trained, trained_card
from perceptual_at.models.unet import UNet
from perceptual_at.models.vision_transformers import VisionTransformer, vit_small
from perceptual_at.models.wide_resnets import WideResNet, wide_resnet28_10, wide_resnet34_10

__all__ = [
    "CosineLinear",
    "DigitsCNN",
    "Normalize",
    "ResNet",
    "UNet",
    "VisionTransformer",
    "WideResNet",
    "fold_classes",
    "from_joined",
    "joined",
    "logits_of",
    "normalized",
    "perceive_at",
    "perception_taps",
    "preact_resnet18",
    "resnet18",
    "resnet26_bottleneck",
    "tap",
    "trained",
    "trained_card",
    "vit_small",
    "whole_batches",
    "wide_resnet28_10",
    "wide_resnet34_10",
    "with_cosine_logits",
]
