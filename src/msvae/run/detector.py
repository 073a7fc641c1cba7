"""A fitted run, whole: graph, verdict and calibration, frozen; images -> ScoreTable.

The one object that users hold. Nothing here imports torch before something needs the networks
themselves: an explanation, or the reference engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from msvae.core.config import Config, from_dict
from msvae.core.errors import RunError
from msvae.core.progress import Progress
from msvae.core.state import Arrays, as_tensor, flatten, under, unflatten
from msvae.data.images import Source
from msvae.engine.choose import choose, engine_name
from msvae.engine.engine import Engine, Graph
from msvae.evaluation.conformal import Calibration, Decision, needed, rank
from msvae.evaluation.table import ScoreTable
from msvae.explain.explanation import Explanation
from msvae.explain.nearest import References
from msvae.run import schema, store
from msvae.run.score import EachMap, Maps, Scan, scan_sources, score_batches
from msvae.scores.verdict import Scores, Verdict

MODEL, CALIBRATION, REFERENCES = (
    f"{name}.safetensors" for name in ("model", "calibration", "references")
)


@dataclass(frozen=True)
class Detector:
    """A fitted detector; make one with `msvae.fit` or `msvae.load`."""

    config: Config
    graph: Graph
    verdict: Verdict
    calibration: Calibration
    decision: Decision
    references: References | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    engine_name: str | None = None  # of `engine.choose.ENGINES`; None: what suits the machine

    def __getstate__(self) -> dict[str, Any]:
        """All but the engine, which a copy, another process or another machine makes for itself."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def engine(self) -> Engine:
        """What runs the graph."""
        return choose(self.graph, self.engine_name, self.allows_bfloat16)

    @property
    def allows_bfloat16(self) -> bool:
        """Whether bfloat16 was tried on held-out images and decides alike."""
        return bool(self.facts.get("precision", {}).get("bfloat16"))

    def score(
        self, images: Source | Sequence[Source], *, target_fpr: float | None = None
    ) -> ScoreTable:
        """Scores, p-values and decisions of images: paths, PIL images, uint8 or float HWC arrays.

        Raises `ImageError` for the first image that cannot be used; `scan` goes on instead.
        """
        several: list[Any] = [images] if _is_one(images) else list(images)  # type: ignore[arg-type]
        scan = self.scan(several, target_fpr=target_fpr)
        if scan.quarantine:
            raise scan.quarantine[0]
        return scan.table

    def explain(self, image: Source, *, gradcam: bool = True) -> Explanation:
        """Why this image: its maps, regions, shares and nearest normals; shows itself in a notebook.

        Raises `ImageError` when the image cannot be used.
        """
        from msvae.explain.explain import explain

        return explain(self, image, gradcam=gradcam)

    def scan(
        self,
        sources: Sequence[Source],
        *,
        target_fpr: float | None = None,
        with_maps: bool = False,
        each_map: EachMap | None = None,
        progress: Progress | None = None,
    ) -> Scan:
        """Score many images; those that cannot be used are listed with the reason.

        `with_maps` keeps every map on disk; `each_map` is called with each name and its maps, and
        keeps none.
        """
        if target_fpr is not None:
            rank(target_fpr, self.calibration.n)
        c = self.config.model
        names, scores, maps, refused = scan_sources(
            self.engine,
            self.verdict,
            sources,
            c.image_size,
            c.resize,
            with_maps=with_maps,
            each_map=each_map,
            progress=progress,
        )
        return Scan(self.decide(names, scores, target_fpr=target_fpr), tuple(refused), maps)

    def decide(
        self, names: Sequence[str], scores: Scores, *, target_fpr: float | None = None
    ) -> ScoreTable:
        """The table of scores (N,) with their p-values and the decision."""
        p_values = self.calibration.p_values(scores)
        decision = self.decision.at(target_fpr)
        return ScoreTable(
            paths=tuple(names),
            scores=scores,
            p_values=p_values,
            p=p_values["fused"],
            flagged=decision.flags(scores, p_values["fused"]),
        )

    def score_pixels(self, batches: Any, *, with_maps: bool = False) -> tuple[Scores, Maps]:
        """Every score (N,), and every map if asked for, of batches of pixels (B, S, S, 3)."""
        return score_batches(self.engine, self.verdict, batches, with_maps=with_maps)

    def thresholds(self) -> dict[str, float]:
        """For every score the value flagged at the run's rate; none where it cannot be kept."""
        rate = self.decision.target_fpr
        return self.calibration.thresholds(rate) if self.calibration.n >= needed(rate) else {}

    def calibrated(self, calibration: Calibration, decision: Decision) -> "Detector":
        """A copy with other thresholds; networks and scores are shared."""
        facts = {**self.facts, "decision": asdict(decision), "n_conformal": calibration.n}
        return replace(self, calibration=calibration, decision=decision, facts=facts)

    def save_calibration(self, folder: Path, beside: Mapping[str, bytes] | None = None) -> None:
        """Put this detector's calibration and decision into its run folder, in one step.

        `beside` are the unchecked tables that come of it; the run's other ones go, but the history.
        """
        kept = ("decision", "n_conformal", "precision")
        changes = {k: self.facts[k] for k in kept if k in self.facts}
        store.update_run(folder, changes, CALIBRATION, self._calibration_arrays(), beside or {})

    def _calibration_arrays(self) -> Arrays:
        c = self.calibration
        return {
            **flatten(self.verdict, "verdict."),
            **{f"conformal.{k}": v for k, v in c.scores.items()},
            **{f"peaks.{k}": v for k, v in c.peaks.items()},
        }

    def save(
        self,
        folder: str | Path,
        tables: Mapping[str, Any] | None = None,
        documents: Mapping[str, Any] | None = None,
        beside: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the run folder; `tables`, `documents` and files `beside` lie in it by name."""
        arrays = {MODEL: self.graph.arrays(), CALIBRATION: self._calibration_arrays()}
        if self.references is not None:
            arrays[REFERENCES] = {
                **vars(self.references),
                "names": store.pack(self.references.names),
            }
        tables, documents, blobs = (
            tables or {},
            documents or {},
            {**self.graph.files(), **(beside or {})},
        )
        store.save_run(Path(folder), self.facts, arrays, tables, documents, blobs)


def load(folder: str | Path, engine: str | None = None) -> Detector:
    """The detector of a run folder; `RunError` says what is wrong with one that cannot serve.

    `engine` is `reference` (torch) or `openvino`; without it `MSVAE_ENGINE` or what suits the machine.
    """
    if engine is not None:
        engine_name(engine)  # refuse one that cannot serve here, not at the first image
    folder = Path(folder)
    facts = store.read_run(folder)
    config = schema.check_facts(folder, facts)
    graph = SavedGraph(folder, facts)
    graph.check(config)
    arrays = _checked_arrays(folder, CALIBRATION, facts, schema.calibration_schema(config.model))
    schema.check_verdict(folder / CALIBRATION, arrays)
    calibration = Calibration(under(arrays, "conformal."), under(arrays, "peaks."))
    decision = Decision(**facts["decision"])
    schema.check_decision(folder, decision, calibration, facts["n_conformal"])
    return Detector(
        config=config,
        graph=graph,
        verdict=unflatten(Verdict, arrays, "verdict."),
        calibration=calibration,
        decision=decision,
        references=_references(folder, config, facts),
        facts=facts,
        engine_name=engine,
    )


def _references(folder: Path, config: Config, facts: Mapping[str, Any]) -> References | None:
    """The references of a run, where it keeps any."""
    if REFERENCES not in facts["checksums"]:
        return None
    stored = _checked_arrays(folder, REFERENCES, facts, schema.references_schema(config.model))
    names = schema.reference_names(folder / REFERENCES, stored.pop("names"), len(stored["fused"]))
    return References(names, **stored)


def _checked_arrays(
    folder: Path, name: str, facts: Mapping[str, Any], wanted: schema.Schema
) -> Arrays:
    """The arrays of a file of a run, as they have to be."""
    schema.check_arrays(folder / name, wanted)
    return store.arrays_of(store.read_checked(folder, name, facts), folder / name)


@dataclass(frozen=True)
class SavedGraph:
    """The graph of a run folder, read when it is asked for."""

    folder: Path
    facts: Mapping[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        """The folder, which is read again where the copy is used."""
        return {"folder": self.folder.resolve(), "facts": self.facts}

    @property
    def side(self) -> int:
        """Of the images, px."""
        return int(self.facts["config"]["model"]["image_size"])

    @property
    def key(self) -> str | None:
        """The checksums of its files."""
        from msvae.engine.convert import BIN, XML

        return " ".join(str(self.facts["checksums"][name]) for name in (XML, BIN, MODEL))

    def check(self, config: Config) -> None:
        """Raise `RunError` where its tensors are not what a run of the settings holds."""
        from msvae.engine.convert import BIN, XML

        absent = {MODEL, CALIBRATION, XML, BIN} - self.facts["checksums"].keys()
        if absent:
            raise RunError(f"{self.folder}: has no checksum of {min(absent)}: {store.REMEDY}")
        schema.check_arrays(self.folder / MODEL, schema.model_schema(config.model), "networks.")

    def arrays(self) -> Arrays:
        """Its tensors by name."""
        return store.arrays_of(self._read(MODEL), self.folder / MODEL)

    def _read(self, name: str) -> bytes:
        return store.read_checked(self.folder, name, self.facts)

    def openvino_model(self) -> Any:
        """The OpenVINO model, in float32."""
        from msvae.engine.convert import XML, restore

        return restore(self.files(), self.arrays(), str(self.folder / XML))

    def files(self) -> dict[str, bytes]:
        """Its OpenVINO form as files."""
        from msvae.engine.convert import BIN, XML

        return {name: self._read(name) for name in (XML, BIN)}

    def torch_graph(self) -> Any:
        """The torch module, on a GPU where there is one."""
        return self._torch_graph

    @cached_property
    def _torch_graph(self) -> Any:
        from msvae.core.device import choose_device
        from msvae.networks.model import Networks
        from msvae.scores.graph import GraphParts, ScoringGraph

        arrays = self.arrays()
        weights = {k: as_tensor(v) for k, v in under(arrays, "networks.").items()}
        try:
            networks = Networks(from_dict(self.facts["config"]).model)
            networks.load_state_dict(weights)
        except RuntimeError as error:
            raise RunError(f"{self.folder}: weights and settings disagree: fit it again") from error
        parts = unflatten(GraphParts, under(arrays, "parts."))
        return ScoringGraph(networks.to(choose_device()).requires_grad_(False), parts)


def _is_one(images: Source | Sequence[Source]) -> bool:
    return isinstance(images, str | Path) or hasattr(images, "shape") or hasattr(images, "convert")
