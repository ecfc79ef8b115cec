"""For torch.hub.load(REPOSITORY, "illama", size="tiny", step="soft_mask", pretrained="illama-tiny-in1k-75.0")."""
from harness.checkpoint import load_weights
from model import VisionTransformer, config

dependencies = ["torch", "torchvision", "tqdm", "PIL", "numpy"]


def illama(size="tiny", step="soft_mask", pretrained="", **fields):
    """A model of any step from ViT to iLLaMA, images (B, 3, H, W) -> logits.

    size, step, fields: those of model.config(), such as img_size=384 or num_classes=10. pretrained: published weights
    by name, or a checkpoint's path; positions are resized, and a head of another number of classes starts anew.
    """
    model = VisionTransformer(config(size, step, **fields))
    if pretrained:
        load_weights(model, pretrained, new_head=True)
    return model
