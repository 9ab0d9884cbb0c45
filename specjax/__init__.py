"""specjax: train, prove and compare speculative-decoding drafters in JAX.

target = specjax.load_target("builtin")
drafter = specjax.init_drafter("fasteagle", target)
out = specjax.generate(target, ["def main():"], drafter)
"""

from specjax import verification
from specjax.drafters import drafter_names
from specjax.generation import generate
from specjax.models.target import Target, load_target
from specjax.trained import init_drafter, load_drafter

__all__ = [
    "Target",
    "drafter_names",
    "generate",
    "init_drafter",
    "load_drafter",
    "load_target",
    "verification",
]
