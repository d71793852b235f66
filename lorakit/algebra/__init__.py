"""Maths on dense weights and on the two factors of a low-rank one. Nothing here knows models, layers or files."""

from lorakit.algebra.decompose import Decomposition, decompose, factored_singular_values
from lorakit.algebra.randomized import approximate, randomized_svd
from lorakit.algebra.rank import Spectrum, effective_rank, energy, numerical_rank, rank_for_energy, stable_rank

__all__ = [
    "Decomposition",
    "Spectrum",
    "approximate",
    "decompose",
    "effective_rank",
    "energy",
    "factored_singular_values",
    "numerical_rank",
    "randomized_svd",
    "rank_for_energy",
    "stable_rank",
]
