"""Grad-CAM and HiResCAM of the scores, by gradients through the graph and the verdict."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from msvae.core.evidence import Evidence
from msvae.networks.model import Networks
from msvae.ops.filters import enlarged_features
from msvae.scores import formulas
from msvae.scores.density import Floats
from msvae.scores.graph import ScoringGraph
from msvae.scores.verdict import Verdict

CAM_SCORES = ("mahalanobis", "reconstruction", "kl", "fused")
STEP = 1e-6  # of a number's size, by which it is moved to measure a gradient

Maps = dict[str, Tensor]
HOOKS = threading.Lock()  # captum hangs its hooks into the networks, which threads may share


def gradcams(
    graph: ScoringGraph,
    verdict: Verdict,
    x: Tensor,
    e: Evidence,
    maps: Maps,
    names: Sequence[str] = CAM_SCORES,
) -> Maps:
    """Grad-CAM of each of the scores `names` for images (B, 3, S, S), (B, S, S) each, signed.

    Σ_k w_k A_k of the coarsest encoder map of at least a quarter of the side, w_k the mean
    gradient of the *score* by the channel (Selvaraju et al. 2017, eq. 1 and 2, without the
    rectifier): above 0 where the evidence raises the score. `hirescam_fused` has the gradient at
    the place itself in place of w_k (HiResCAM, Draelos & Carin 2020): what a place does, not what
    its channels do on average. The pretext network and the segmenter have encoders of their own, and
    the structure map reads the picture: what they say, `e` and the `maps`, is held fixed.
    """
    from captum.attr import LayerGradCam, LayerGradientXActivation

    stage = max(1, sum(f.shape[-1] >= x.shape[-1] // 4 for f in e.features)) - 1
    layer = graph.networks.vae.stages[stage]
    out = {}
    with HOOKS, torch.enable_grad():
        for name in names:
            score = _score_of_images(graph.networks, _differentiable(graph, verdict, name, e, maps))
            # captum forwards the whole batch; a score of an image depends on that image alone
            cam = LayerGradCam(score, layer)
            out[f"gradcam_{name}"] = _only(cam.attribute(_leaf(x), relu_attributions=False))
            if name == "fused":
                each = LayerGradientXActivation(score, layer)
                out["hirescam_fused"] = _only(each.attribute(_leaf(x))).sum(dim=1, keepdim=True)
    side = x.shape[-1]
    return {k: enlarged_features(v.detach()[:, 0], side) for k, v in out.items()}


def _leaf(x: Tensor) -> Tensor:
    """The images as what gradients are asked of: the frozen weights want none."""
    return x.detach().clone().requires_grad_()


def _score_of_images(
    networks: Networks, of_evidence: Callable[[Evidence], Tensor]
) -> Callable[[Tensor], Tensor]:
    def score(x: Tensor) -> Tensor:
        return of_evidence(networks.forward_mean(x))

    return score


def _only(attribution: Tensor | tuple[Tensor, ...]) -> Tensor:
    return attribution[0] if isinstance(attribution, tuple) else attribution


def _differentiable(
    graph: ScoringGraph, verdict: Verdict, name: str, known: Evidence, maps: Maps
) -> Callable[[Evidence], Tensor]:
    """The score as a function of the VAE's evidence, (B,); what other networks say is the known one.

    The verdict is numpy: a score that it makes goes through its gradient by the graph's numbers, in
    which it is linear for a step as small as a gradient's.
    """
    numbers = graph.numbers(known, maps).detach()
    slope = verdict_gradient(verdict, numbers.cpu().double().numpy(), name)
    slopes = torch.from_numpy(slope).to(numbers)

    def whole(e: Evidence) -> Tensor:
        joined = e._replace(pretext=known.pretext, segmentation=known.segmentation)
        if known.pretext.shape[1]:  # otherwise the embedding is the VAE's own
            joined = joined._replace(embedding=known.embedding)
        places = graph.parts.places
        own = {
            "residual": places.residual(e),
            "spatial": places.spatial.drawn(e),
        }
        moved: Tensor = (graph.numbers(joined, {**maps, **own}) * slopes).sum(dim=1)
        return moved

    direct: dict[str, Callable[[Evidence], Tensor]] = {
        "mahalanobis": graph.parts.mahalanobis,
        "reconstruction": formulas.reconstruction,
        "kl": formulas.kl,
    }
    return direct.get(name, whole)


def verdict_gradient(verdict: Verdict, numbers: Floats, name: str) -> Floats:
    """∂ score / ∂ numbers (B, K), by central differences in double precision."""
    steps = STEP * np.maximum(np.abs(numbers), 1e-6)
    gradient = np.empty_like(numbers)
    for column in range(numbers.shape[1]):
        moved = np.repeat(numbers[None], 2, axis=0)
        moved[0, :, column] += steps[:, column]
        moved[1, :, column] -= steps[:, column]
        up, down = verdict(moved.reshape(-1, numbers.shape[1]))[name].reshape(2, -1)
        gradient[:, column] = (up - down) / (2 * steps[:, column])
    return gradient
