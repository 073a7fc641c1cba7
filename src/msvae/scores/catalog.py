"""The scores, statistics and maps by name: their order in a run, what they are called, their units."""

BANDS = 3  # differences of a picture, fine to coarse; what is left over is the last band
_LEVELS = ("fine", "middle", "coarse", "rest")
# Maps whose oddest places are a score, and which the fused map joins.
MAP_SCORES = ("residual", "spatial", "structure", "inspection")
MAPS = ("reconstruction", *MAP_SCORES, "fused")
# Scores that the graph computes of an image. The others are made of these and of the statistics.
GRAPH_SCORES = (
    "reconstruction",
    "mahalanobis",
    "kl",
    "spread",
    *MAP_SCORES,
    "order",
    "turn",
    "neighbours",
)
# What the fusion joins: scores with a direction, and a two-sided density of the statistics.
FUSED_SCORES = (*MAP_SCORES, "typicality", "order", "turn", "neighbours")
STATISTIC_GROUPS = {
    "residual bands": tuple(f"residual_{k}_{c}" for k in _LEVELS for c in ("luma", "chroma")),
    "image bands": tuple(f"image_{k}_{c}" for k in _LEVELS for c in ("luma", "chroma")),
    "latent": ("rate", "log_spread", "log_length", "log_error"),
    "latent distance": ("log_distance",),
}
STATISTICS = tuple(name for group in STATISTIC_GROUPS.values() for name in group)
NUMBERS = (*GRAPH_SCORES, *STATISTICS)  # columns of what the graph gives
ABOUT = {
    "reconstruction": "squared error of the reconstruction (seed)",
    "mahalanobis": "distance of the latent mean (seed)",
    "weighted": "0.6 / 0.4 sum of both, min-max (seed)",
    "weighted_raw": "the same, as literally written (seed)",
    "kl": "rate: divergence from the prior",
    "elbo": "negative evidence lower bound",
    "spread": "width of the posterior",
    "spatial": "local feature distance, oddest places",
    "residual": "standardised error map, oddest places",
    "structure": "local structure distance, oddest places",
    "inspection": "marked defects, oddest places",
    "order": "which channel order is this?",
    "turn": "how many quarter turns is this?",
    "neighbours": "cosine distance to the nearest normals",
    "bands": "two-sided, error by frequency band",
    "complexity": "two-sided, the image by frequency band",
    "typicality": "two-sided density of all statistics",
    "fused": "all of them: the decision",
}
EXTREMES = {  # what a high score says of an image, and what a low one says
    "reconstruction": ("as badly rebuilt as the worst", "as well rebuilt as the best"),
    "mahalanobis": ("as far from the latent mean as the farthest", "as near it as the nearest"),
    "kl": ("as rich in the latents as the richest", "as empty in the latents as the emptiest"),
    "elbo": ("as unlikely as the least likely", "as likely as the likeliest"),
    "spread": ("as vague in the latents as the vaguest", "as definite as the most definite"),
    "spatial": ("with parts as odd as the oddest", "with parts as usual as the most usual"),
    "residual": (
        "as badly rebuilt for the place as the worst",
        "as well rebuilt for the place as the best",
    ),
    "structure": ("with structure as odd as the oddest", "as regular as the most regular"),
    "inspection": ("as marked as the most marked", "as clean as the cleanest"),
    "order": ("as hard to colour as the hardest", "as easy to colour as the easiest"),
    "turn": ("as hard to set upright as the hardest", "as easy to set upright as the easiest"),
    "neighbours": ("as unlike its neighbours as the loneliest", "as like them as the closest"),
    "bands": ("with errors as unusual as the oddest", "with errors as usual as the most usual"),
    "complexity": (
        "with detail as unusual as the oddest",
        "with detail as usual as the most usual",
    ),
    "typicality": ("as untypical as the least typical", "as typical as the most typical"),
    "fused": ("as surprising as the most surprising", "as ordinary as the most ordinary"),
    "detail": ("as busy as the busiest", "as blurred as the bluntest"),
}
OTHERWISE = ("as high as the highest", "as low as the lowest")
UNITS = {
    "reconstruction": "squared intensity",
    "difference": "intensity",
    "residual": "standard deviations",
    "spatial": "standard deviations",
    "structure": "standard deviations",
    "inspection": "log-odds",
    "fused": "nats",
}
SHORT_UNITS = {k: v.replace("standard deviations", "sd") for k, v in UNITS.items()}
TITLES = {
    "reconstruction": "Reconstruction error",
    "difference": "Brighter or darker than rebuilt",
    "residual": "Unusual reconstruction error",
    "spatial": "Unusual features",
    "structure": "Unusual structure",
    "inspection": "Marked as defect",
    "fused": "All of them, fused",
    "gradcam_fused": "Grad-CAM of the fused score",
    "hirescam_fused": "HiResCAM of the fused score",
    "gradcam_mahalanobis": "Grad-CAM of the Mahalanobis distance",
    "gradcam_reconstruction": "Grad-CAM of the reconstruction error",
    "gradcam_kl": "Grad-CAM of the KL",
}
