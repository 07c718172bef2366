"""DeepSeek-V3 in JAX: one model definition for training and generation.

import dsjax
lm = dsjax.load_pretrained("runs/tiny")
lm.generate("def main(", max_tokens=64, temperature=0.7, seed=0)
"""

from dsjax.errors import InputError
from dsjax.language_model import LanguageModel, init, load_pretrained

__all__ = ["InputError", "LanguageModel", "init", "load_pretrained"]
