"""The surprisal of a score, by scipy."""

import numpy as np
from scipy.stats import norm


def tail_of(z):
    """-log P(Z >= z); beyond what one in twenty reaches, the line that touches it there."""
    z, edge = np.asarray(z), norm.ppf(0.95)
    slope = norm.pdf(edge) / norm.sf(edge)
    return -norm.logsf(np.minimum(z, edge)) + slope * (z - edge).clip(0)
