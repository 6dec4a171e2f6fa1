"""The public face of the pair pipelines: stores, long tails, recipes, view parameters and the pair loader.

What is asked for is loaded then (its names and places are in ``__init__.pyi``), so that a command line can be read
without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
