from .backbones import BackboneSpec, build_backbone, load_backbone, save_backbone

__all__ = ["BackboneSpec", "build_backbone", "load_backbone", "save_backbone"]
