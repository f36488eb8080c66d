"""Which caches are worth training, and training them.

Three rounds, each informed by the one before, because training time is what is short:

    students   networks with their own trunk on the raw input, priced at a few percent of the backbone. Early caches
               need capacity: they bring most of the saving (docs/experiments.md). The larger reads the smaller one.
    pooled     probes on the pooled activation of every split point: cheap, and enough late in the backbone.
    trunks     convolutional or transformer caches where a perfectly informed cache would save most (`_headroom`).

Later caches read the logits of the student that the best plan so far ends with. What is enabled in the end is decided
elsewhere (`placement`), jointly with the thresholds; a cache trained in vain costs nothing at run time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from offramp.augment import is_image
from offramp.caches import CacheShape, LearnedCache, build_cache
from offramp.confidence import CONFIDENCES, Selector, auroc, statistics
from offramp.cost import count_flops
from offramp.distillation import Recipe, Stop, TrainingLog, cache_logits, train
from offramp.errors import StorageError
from offramp.placement import CacheCosts, plan_path
from offramp.progress import Bar, bar
from offramp.recording import CERTIFY, TRAIN, TUNE, Recording
from offramp.splitting import SplitModel, SplitPoint
from offramp.tasks import Classification
from offramp.types import CostTable, Records

STUDENT_SHARES = (0.04, 0.10)  # of the backbone's FLOPs
TRUNK_SHARE = 0.015
MAX_TRUNKS = 2
MAX_POINTS = 12  # split points that get pooled caches
MIN_PASSES = 5  # over the training inputs; a second student that cannot have as many leaves its time to the first
ROUND_SHARES = {"students": 0.68, "pooled": 0.10, "trunks": 0.22}  # of the time for training
MIN_WIDTH, MAX_WIDTH = 8, 192


@dataclass
class Trained:
    """A trained candidate. `logits_NC` are its logits on the recorded rows number `rows`, in rising order."""

    cache: LearnedCache
    position: int
    rows: NDArray[np.intp]
    logits_NC: Tensor
    log: TrainingLog
    auroc: dict[str, float] = field(default_factory=dict)
    confidence_N: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def on(self, rows: NDArray[np.intp]) -> Tensor:
        """(len(rows), C) logits on these recorded rows."""
        return self.logits_NC[np.searchsorted(self.rows, rows)]


class Search:
    """Trains candidates round by round and keeps what they said on the recorded rows."""

    def __init__(
        self,
        split: SplitModel,
        task: Classification,
        recording: Recording,
        costs: CostTable,
        *,
        tolerance: float,
        seed: int,
        deadline: float | None,
        stop: Stop,
        workdir: Path | None,
        show: bool,
    ) -> None:
        self.split, self.task, self.recording, self.costs = split, task, recording, costs
        self.tolerance, self.seed, self.deadline, self.stop, self.show = tolerance, seed, deadline, stop, show
        self.store = None if workdir is None else workdir / "caches"
        self.train_rows = recording.index(TRAIN)
        self.judged_rows = np.sort(np.concatenate([recording.index(TUNE), recording.index(CERTIFY)]))
        self.classes = recording.logits_NC.shape[1]
        self.flops = costs.backbone.flops
        self.trained: list[Trained] = []

    def run(self) -> list[Trained]:
        """All candidates, in the order in which a request meets them. Ends early, with what there is, on `stop`."""
        time_left = None if self.deadline is None else max(1.0, self.deadline - time.monotonic())
        limits = {name: None if time_left is None else share * time_left for name, share in ROUND_SHARES.items()}
        self._round("students", self._affordable(list(self._students()), limits["students"]), limits["students"])
        reader = self._reader()
        self._round("pooled", list(self._pooled(reader)), limits["pooled"])
        self._round("trunks", list(self._trunks(reader)), limits["trunks"])
        self.trained.sort(key=lambda trained: trained.position)
        return self.trained

    # -- the rounds --------------------------------------------------------------------------------

    def _students(self) -> Iterator[LearnedCache]:
        point = self.split.points[0]
        floating = point.dtype.is_floating_point
        if not (is_image(tuple(point.shape), floating=floating) or (not floating and len(point.shape) == 1)):
            return
        kind, previous = ("student" if floating else "transformer"), None
        for share in STUDENT_SHARES:
            shape = self._widest(point, kind, share)
            if shape is None or (previous and shape.width <= previous.shape.width):
                continue
            previous = self._cache(point, shape, previous)
            yield previous

    def _affordable(self, students: list[LearnedCache], limit_s: float | None) -> list[LearnedCache]:
        """All students, or the first alone where time is too short for each to see its inputs MIN_PASSES times."""
        if limit_s is None or not students:
            return students
        size = max(self.costs.backbone.time_ms)
        seconds_per_flop = self.costs.backbone.time_ms[size].median_ms / 1000 / size / self.flops
        needed_s = 3 * seconds_per_flop * sum(map(self._flops, students)) * MIN_PASSES * len(self.train_rows)
        return students if needed_s <= limit_s else students[:1]

    def _pooled(self, reader: Trained | None) -> Iterator[LearnedCache]:
        points = self.split.points[0 if reader is None else 1 :]
        chosen = {round(k) for k in np.linspace(0, len(points) - 1, MAX_POINTS)}  # evenly, where there are many
        for point in (point for k, point in enumerate(points) if k in chosen):
            if not point.dtype.is_floating_point:
                continue
            width = 64 if point.depth < 0.5 else 32
            yield self._cache(point, CacheShape("mlp", width), None if reader is None else reader.cache)
            if point.depth > 0.5:
                yield self._cache(point, CacheShape("linear"), None)

    def _trunks(self, reader: Trained | None) -> Iterator[LearnedCache]:
        wanted = {position for position, _ in self._headroom()[:MAX_TRUNKS]}
        for point in self.split.points:
            kind = {3: "conv", 2: "transformer"}.get(len(point.shape))
            if point.position not in wanted or kind is None or not point.dtype.is_floating_point:
                continue
            shape = self._widest(point, kind, min(TRUNK_SHARE, 0.1 * (1 - point.depth)))
            if shape is not None:
                yield self._cache(point, shape, None if reader is None else reader.cache)

    def _headroom(self) -> list[tuple[int, float]]:
        """(position, saving) of the split points after the input, most promising first: what the best plan would
        gain if the cache there knew exactly when it agrees. An upper bound, good enough to rank."""
        if not self.trained:
            return []
        base = self._best_cost(None)
        gains: dict[int, float] = {}
        for k, trained in enumerate(self._ordered()):
            if trained.position:
                gain = base - self._best_cost(k)
                gains[trained.position] = max(gain, gains.get(trained.position, -1.0))
        return sorted(gains.items(), key=lambda item: -item[1])

    def _best_cost(self, oracle: int | None) -> float:
        """Cost of the best plan on tune at the tolerance; cache number `oracle` is taken to know when it agrees."""
        records = self.records(self._ordered(), TUNE)
        if oracle is not None:
            confidence_NK = records.confidence_NK.copy()
            confidence_NK[:, oracle] = records.agreement_NK[:, oracle]
            records = dataclasses.replace(records, confidence_NK=confidence_NK)
        path = plan_path(records, self._estimated_costs(self._ordered()), self.tolerance, prices=20)
        return path[-1].cost

    def _reader(self) -> Trained | None:
        """The student that later caches read: the last one in the best plan of students alone."""
        if not self.trained:
            return None
        path = plan_path(
            self.records(self.trained, TUNE), self._estimated_costs(self.trained), self.tolerance, prices=40
        )
        enabled = [k for k, threshold in enumerate(path[-1].thresholds_K) if np.isfinite(threshold)]
        return self.trained[enabled[-1] if enabled else 0]

    # -- one candidate -----------------------------------------------------------------------------

    def _round(self, name: str, caches: Sequence[LearnedCache], limit_s: float | None) -> None:
        if not caches:
            return
        started = time.monotonic()
        weights = [self._weight(cache) for cache in caches]
        with bar(f"training {name}", len(caches), show=self.show) as progress:
            for i, cache in enumerate(caches):
                if self.stop.requested:
                    return
                remaining = None if limit_s is None else limit_s - (time.monotonic() - started)
                if remaining is not None and remaining < 1.0:
                    return
                share = weights[i] / sum(weights[i:])
                progress.note(cache.name)
                trained = self._load(cache)
                if trained is None:
                    limit = None if remaining is None else remaining * share
                    trained = self._train(cache, limit, progress)
                else:
                    progress.advance()
                if trained.log.steps:
                    self.trained.append(trained)

    def _train(self, cache: LearnedCache, limit_s: float | None, progress: Bar) -> Trained:
        position = self._position(cache)
        # The head's width changes with what it reads; the read logits were recorded when that cache was trained.
        read = None if cache.reads is None else self._named(cache.reads)
        log = train(
            cache,
            self.recording,
            position,
            self.train_rows,
            None if read is None else read.logits_NC,
            self._recipe(cache),
            seed=self.seed,
            time_limit_s=limit_s,
            device=self.split.device,
            stop=self.stop,
            progress=progress,
        )
        trained = self._judge(cache, position, log)
        self._save(trained)
        return trained

    def _judge(self, cache: LearnedCache, position: int, log: TrainingLog) -> Trained:
        """Run the cache on the rows that matter and pick the confidence that ranks its disagreements best on tune."""
        rows = np.arange(len(self.recording)) if position == 0 else self.judged_rows
        read = None if cache.reads is None else self._named(cache.reads)
        read_NC = None if read is None else read.on(rows)
        logits = cache_logits(cache, self.recording, position, rows, read_NC, self.split.device)
        trained = Trained(cache, position, rows, logits, log)
        self._choose_confidence(trained, read)
        return trained

    def _choose_confidence(self, trained: Trained, read: Trained | None) -> None:
        tune = self.recording.index(TUNE)
        logits = trained.on(tune)
        read_BC = None if read is None else read.on(tune)
        agreement = self._agreement(trained, tune)
        scores = {name: function(logits).double().numpy() for name, function in CONFIDENCES.items()}
        scores["selector"] = _cross_fitted(statistics(logits, read_BC), torch.from_numpy(agreement), self.seed)
        trained.auroc = {name: auroc(score, agreement) for name, score in scores.items()}
        best = max(trained.auroc, key=lambda name: (np.nan_to_num(trained.auroc[name], nan=0.0), name != "selector"))
        selector = None
        if best == "selector":
            selector = Selector.fitted(statistics(logits, read_BC), torch.from_numpy(agreement))
        trained.cache.use_confidence(best, selector)
        trained.confidence_N = scores[best]

    # -- what the statistical half gets ------------------------------------------------------------

    def records(self, candidates: Sequence[Trained], part: int) -> Records:
        """What these candidates said about the tune or certify rows. On tune a learned selector is cross-fitted: each
        row is scored by a selector that has not seen it, as any later row will be."""
        rows = self.recording.index(part)
        names = [trained.cache.name for trained in candidates]
        confidence, answers, agreement = [], [], []
        for trained in candidates:
            read = None if trained.cache.reads is None else self._named(trained.cache.reads)
            logits = trained.on(rows)
            if part == TUNE:
                confidence.append(trained.confidence_N)
            else:
                trained.cache.cpu()
                score = trained.cache.confidence(logits, None if read is None else read.on(rows))
                confidence.append(score.double().numpy())
                trained.cache.to(self.split.device)
            answers.append(self.task.answer(logits).numpy())
            agreement.append(self._agreement(trained, rows))
        labels = self.recording.label_N
        return Records(
            np.stack(confidence, axis=1),
            np.stack(answers, axis=1),
            np.stack(agreement, axis=1),
            self.recording.logits_NC[rows].argmax(1),
            tuple(-1 if t.cache.reads is None else names.index(t.cache.reads) for t in candidates),
            None if labels is None else labels[rows],
        )

    def _agreement(self, trained: Trained, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        backbone = torch.from_numpy(self.recording.logits_NC[rows])
        agree: NDArray[np.bool_] = self.task.agree(
            self.task.answer(trained.on(rows)), self.task.answer(backbone)
        ).numpy()
        return agree

    def _estimated_costs(self, candidates: Sequence[Trained]) -> CacheCosts:
        """In FLOPs: the caches' time is measured only once they are all there."""
        stages = np.array([stage.flops for stage in self.costs.stages])
        before = np.concatenate([[0.0], np.cumsum(stages)]) / stages.sum()
        cache = [self._flops(trained.cache) / self.flops for trained in candidates]
        return CacheCosts(np.array([before[trained.position] for trained in candidates]), np.array(cache))

    # -- small parts -------------------------------------------------------------------------------

    def _recipe(self, cache: LearnedCache) -> Recipe:
        n = len(self.train_rows)
        if cache.shape.kind in ("linear", "mlp"):
            return Recipe(rows=int(np.clip(12 * n, 20_000, 120_000)), batch_size=min(256, max(16, n // 8)))
        most = 320_000 if self._position(cache) == 0 else 120_000
        rows = int(np.clip(30 * n, 30_000, most))
        return Recipe(rows=rows, batch_size=min(128, max(16, n // 8)), learning_rate=4e-3)

    def _weight(self, cache: LearnedCache) -> float:
        """Share of the training time: by FLOPs, with a floor for what every step costs."""
        return self._flops(cache) + 0.01 * self.flops

    def _widest(self, point: SplitPoint, kind: str, share: float) -> CacheShape | None:
        """The widest cache of this kind within a share of the backbone's FLOPs; None if even the narrowest is above."""
        best = None
        step = 32 if kind == "transformer" else 8
        for width in range(max(step, MIN_WIDTH), MAX_WIDTH + 1, step):
            shape = CacheShape(kind, width)  # type: ignore[arg-type]
            if self._flops(self._cache(point, shape, None)) > share * self.flops:
                break
            best = shape
        return best

    def _cache(self, point: SplitPoint, shape: CacheShape, reads: LearnedCache | None) -> LearnedCache:
        name = f"{point.name}/{shape.label}"
        with torch.random.fork_rng(devices=[]):
            # By its name, so that a resumed search, which skips some, begins each cache alike.
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:6], "little"))
            return LearnedCache(
                name,
                point.name,
                shape,
                tuple(point.shape),
                self.classes,
                reduction=self.recording.reductions[point.position],
                vocabulary=self._vocabulary(point),
                reads=None if reads is None else reads.name,
            )

    def _vocabulary(self, point: SplitPoint) -> int:
        if point.dtype.is_floating_point:
            return 0
        return int(self.recording.features[point.position][self.train_rows].max()) + 1

    def _flops(self, cache: LearnedCache) -> float:
        feature = torch.from_numpy(np.array(self.recording.features[self._position(cache)][:1]))
        feature = feature.float() if feature.is_floating_point() else feature.long()
        read = None if cache.reads is None else torch.zeros(1, self.classes)
        training = cache.training
        cache.eval()
        device = next(cache.parameters()).device
        with torch.inference_mode():
            flops = count_flops(
                lambda: cache.from_feature(feature.to(device), None if read is None else read.to(device))
            )
        cache.train(training)
        return flops

    def _position(self, cache: LearnedCache) -> int:
        return next(point.position for point in self.split.points if point.name == cache.point)

    def _named(self, name: str) -> Trained:
        return next(trained for trained in self.trained if trained.cache.name == name)

    def _ordered(self) -> list[Trained]:
        return sorted(self.trained, key=lambda trained: trained.position)

    # -- resuming ----------------------------------------------------------------------------------

    def _file(self, cache: LearnedCache) -> Path:
        assert self.store is not None
        later = ("folded", "confidence", "selector_features")  # decided after training
        what = {
            "backbone": self.split.fingerprint,
            "data": self.recording.fingerprint(TRAIN),
            "seed": self.seed,
            "cache": {name: value for name, value in cache.describe().items() if name not in later},
        }
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return self.store / f"{key}.safetensors"

    def _save(self, trained: Trained) -> None:
        if self.store is None or self.stop.requested:  # half-trained is not what a later run should find
            return
        file = self._file(trained.cache)
        state = {name: value.detach().cpu().contiguous() for name, value in trained.cache.state_dict().items()}
        state = {name: value for name, value in state.items() if not name.startswith("selector.")}
        temporary = file.with_suffix(".tmp")
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            save_file(state, temporary, {"log": json.dumps(dataclasses.asdict(trained.log))})
            temporary.replace(file)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"could not keep a trained cache in {self.store}: {error}. Free some space, or choose another "
                "`workdir=`."
            ) from error

    def _load(self, cache: LearnedCache) -> Trained | None:
        if self.store is None or not self._file(cache).exists():
            return None
        file = self._file(cache)
        with safe_open(file, "pt") as header:
            log = TrainingLog(**json.loads(header.metadata()["log"]))
        ready = build_cache(cache.describe() | {"folded": True, "selector_features": None, "confidence": "max_softmax"})
        ready.load_state_dict(load_file(file))
        ready.to(self.split.device).requires_grad_(requires_grad=False)
        return self._judge(ready, self._position(ready), log)


def _cross_fitted(x_NF: Tensor, agreement_N: Tensor, seed: int, folds: int = 5) -> NDArray[np.float64]:
    """(N,) scores of the learned selector, each row by a selector fitted on the other folds."""
    fold_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(x_NF)) % folds)
    score_N = torch.zeros(len(x_NF), dtype=torch.float64)
    for fold in range(folds):
        inside = fold_N != fold
        if inside.any() and (~inside).any():
            selector = Selector.fitted(x_NF[inside], agreement_N[inside])
            z = (x_NF[~inside] - selector.mean) / selector.scale
            score_N[~inside] = torch.sigmoid(z @ selector.weight + selector.bias).double()
    return score_N.numpy()
