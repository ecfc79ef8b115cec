"""For torch.hub.load(REPOSITORY, "illama", size="tiny", step="soft_mask", pretrained="illama-tiny-in1k-75.0")."""
import sys
import warnings
from pathlib import Path

# The caller may have a model.py of their own: ours is imported aside of it, and leaves no name behind.
OURS = ("model", "harness")
theirs = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in OURS}
sys.path.insert(0, str(Path(__file__).parent))
try:
    from harness.checkpoint import build, load_weights, open_checkpoint
    from model import VisionTransformer, config
finally:
    sys.path.remove(str(Path(__file__).parent))
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.modules.update(theirs)

dependencies = ["torch", "torchvision", "tqdm", "PIL", "numpy"]


def illama(size="", step="", pretrained="", **fields):
    """A model of any step from ViT to iLLaMA, images (B, 3, H, W) -> logits.

    size, step, fields: those of model.config(), such as img_size=384 or num_classes=10. pretrained: published weights
    by name, or a checkpoint's path. With pretrained alone the model is the checkpoint's; else a warning says what had
    to be adapted: positions are resized, and a head of another number of classes starts anew.
    """
    if pretrained and not (size or step or fields):
        return build(open_checkpoint(pretrained))
    model = VisionTransformer(config(size or "tiny", step or "soft_mask", **fields))
    for note in load_weights(model, pretrained, new_head=True) if pretrained else ():
        warnings.warn(note, stacklevel=2)
    return model
