"""The candidate caches of one fit: building, training and judging them, and what they said on the recorded rows.

`search` and the other methods decide which caches are worth a try; this is how any of them is tried.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from offramp.blending import ALONE, fit_blend
from offramp.caches import Cache, CacheShape, LearnedCache
from offramp.confidence import Selector, auroc, statistics
from offramp.cost import count_flops
from offramp.distillation import Recipe, Stop, Training, TrainingLog, cache_logits
from offramp.errors import InputError, StorageError
from offramp.mixtures import Mixer, Mixtures
from offramp.placement import CacheCosts
from offramp.progress import Bar, bar
from offramp.recording import CERTIFY, TRAIN, TUNE, Recording
from offramp.splitting import SplitModel, SplitPoint
from offramp.tasks import Classification
from offramp.types import CostTable, Records

MIN_WIDTH, MAX_WIDTH = 8, 192
MAX_TUNE = 50_000  # tune rows that are looked at: the time of every search grows with them, its result hardly changes
BLEND_ROWS = 4096  # tune rows that two weights are fitted on
CHUNK_ROWS = 4096  # recorded rows whose logits are in memory at a time

OfLogits = Callable[[Tensor, Tensor | None], Tensor]  # (B, C) own logits, those read -> (B, ...)
CLEARLY = 0.01  # of AUROC: by less than this the best of several scores on tune is best by chance


@dataclass
class Trained:
    """A trained candidate. `logits_NC` are its logits on the recorded rows number `rows` (that judge it), in rising
    order, and `confidence_N` is its confidence on the tune rows."""

    cache: Cache
    position: int
    rows: NDArray[np.intp]
    logits_NC: Tensor
    log: TrainingLog
    auroc: dict[str, float] = field(default_factory=dict)
    confidence_N: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def on(self, rows: NDArray[np.intp]) -> Tensor:
        """(len(rows), C) logits on these recorded rows."""
        return self.logits_NC[np.searchsorted(self.rows, rows)]


class Candidates:
    """Trains candidates one by one or round by round; `trained` holds them in the order of training."""

    def __init__(
        self,
        split: SplitModel,
        task: Classification,
        recording: Recording,
        costs: CostTable,
        *,
        seed: int,
        deadline: float | None,
        stop: Stop,
        workdir: Path | None,
        show: bool,
    ) -> None:
        self.split, self.task, self.recording, self.costs = split, task, recording, costs
        self.seed, self.deadline, self.stop, self.show = seed, deadline, stop, show
        self.workdir, self.store = workdir, None if workdir is None else workdir / "caches"
        self.train_rows = recording.index(TRAIN)
        self.tune_rows, self.certify_rows = _thinned(recording.index(TUNE), MAX_TUNE), recording.index(CERTIFY)
        self.judged_rows = np.sort(np.concatenate([self.tune_rows, self.certify_rows]))
        self.classes = recording.logits_NC.shape[1]
        self.flops = costs.backbone.flops
        self.trained: list[Trained] = []
        self.mixtures: Mixtures | None = None
        self.confidence: str | None = None  # decides for every cache that has it; else what ranks best on tune
        self._estimates_s: dict[tuple[str, Recipe], float] = {}  # seconds of a training, by the cache's name
        self._vocabularies: dict[int, int] = {}  # by position: each takes a look at all train rows

    @property
    def time_left(self) -> float | None:
        """Seconds until training has to end, at least one; None without a limit."""
        return None if self.deadline is None else max(1.0, self.deadline - time.monotonic())

    @property
    def points(self) -> Sequence[SplitPoint]:
        """The split points at which there can be caches: all, or those behind the input where inputs were not kept."""
        return self.split.points[0 if self.recording.has_inputs else 1 :]

    def ordered(self) -> list[Trained]:
        """The candidates in the order in which a request meets them."""
        return sorted(self.trained, key=lambda trained: trained.position)

    def named(self, name: str) -> Trained:
        return next(trained for trained in self.trained if trained.cache.name == name)

    @cached_property
    def answer_N(self) -> Tensor:
        """(recorded rows,) the backbone's answers."""
        every_row, logits_NC = np.arange(len(self.recording)), self.recording.logits_NC
        return torch.cat([self.task.answer(torch.from_numpy(logits_NC[rows])) for rows in _chunks(every_row)])

    # -- building ----------------------------------------------------------------------------------

    def build(self, point: SplitPoint, shape: CacheShape, reads: Cache | None = None) -> LearnedCache:
        """A fresh cache of this shape; its initial weights depend on the seed and its name alone.

        reads: an earlier candidate, with whose logits its own will be blended. InputError where a request meets that
        one later.
        """
        if reads is not None and self.position(reads) > point.position:
            raise InputError(f"a cache at {point.name} was to read {reads.name}, which comes only after it")
        name = f"{point.name}/{shape.label}"
        with torch.random.fork_rng(devices=[]):
            # By its name, so that a resumed search, which skips some, begins each cache alike.
            seed = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:6], "little")
            torch.default_generator.manual_seed(seed)  # the CPU's alone: only its state is put back
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

    def widest(self, point: SplitPoint, kind: str, share: float) -> CacheShape | None:
        """The widest cache of this kind within a share of the backbone's FLOPs; None if even the narrowest is above."""
        best = None
        step = 32 if kind == "transformer" else 8
        for width in range(max(step, MIN_WIDTH), MAX_WIDTH + 1, step):
            shape = CacheShape(kind, width)  # type: ignore[arg-type]
            if self.flops_of(self.build(point, shape)) > share * self.flops:
                break
            best = shape
        return best

    def flops_of(self, cache: Cache) -> float:
        """FLOPs of one look-up of one row."""
        feature = torch.from_numpy(np.array(self.recording.features[self.position(cache)][:1]))
        feature = feature.float() if feature.is_floating_point() else feature.long()
        read = None if cache.reads is None else torch.zeros(1, self.classes)
        training = cache.training
        cache.eval()
        tensor = next(itertools.chain(cache.parameters(), cache.buffers()), None)
        device = self.split.device if tensor is None else tensor.device
        with torch.inference_mode():
            flops = count_flops(
                lambda: cache.from_feature(feature.to(device), None if read is None else read.to(device))
            )
        cache.train(training)
        return flops

    def position(self, cache: Cache) -> int:
        return next(point.position for point in self.split.points if point.name == cache.point)

    def _vocabulary(self, point: SplitPoint) -> int:
        if point.dtype.is_floating_point:
            return 0
        if point.position not in self._vocabularies:
            ids = self.recording.features[point.position]
            self._vocabularies[point.position] = 1 + max(int(ids[rows].max()) for rows in _chunks(self.train_rows))
        return self._vocabularies[point.position]

    def decide_by(self, confidence: str | None) -> None:
        """Use this score in every candidate that has it; None, the first that none ranks clearly better than."""
        self.confidence = confidence
        for trained in self.trained:
            self._choose_confidence(trained)

    # -- training ----------------------------------------------------------------------------------

    def seconds_for(self, cache: LearnedCache, recipe: Recipe) -> float:
        """Estimate of the time that this training takes, from a few timed steps; 0 where an earlier run has done it."""
        stored = self._stored_log(cache, recipe)
        if stored is not None and stored.steps >= recipe.steps:
            return 0.0
        key = cache.name, recipe
        if key not in self._estimates_s:
            self._estimates_s[key] = self._training(copy.deepcopy(cache), recipe).estimated_seconds()
        return self._estimates_s[key]

    def train_round(
        self,
        name: str,
        caches: Sequence[LearnedCache],
        recipe: Callable[[LearnedCache], Recipe],
        limit_s: float | None,
    ) -> None:
        """Train these one after the other; under a limit each has a share of the time as large as its need."""
        if not caches:
            return
        started = time.monotonic()
        needs = [1.0] * len(caches) if limit_s is None else [self.seconds_for(one, recipe(one)) for one in caches]
        with bar(f"training {name}", len(caches), show=self.show) as progress:
            for i, cache in enumerate(caches):
                remaining = None if limit_s is None else limit_s - (time.monotonic() - started)
                if self.stop.requested or (remaining is not None and remaining < 0.5):
                    return
                progress.note(cache.name)
                share = needs[i] / max(sum(needs[i:]), 1e-9)
                self.train(cache, recipe(cache), None if remaining is None else remaining * share, progress)

    def train(self, cache: LearnedCache, recipe: Recipe, limit_s: float | None, progress: Bar) -> None:
        """Train one cache, or load it where an earlier run has left it, and add it to the candidates."""
        trained = self._load(cache, recipe, limit_s)
        if trained is None:
            trained = self._train(cache, recipe, limit_s, progress)
        else:
            progress.advance()
        if trained.log.steps:
            self.trained.append(trained)

    def mixer(self, *, bfloat16: bool, keep: Sequence[int] = ()) -> Mixer:
        """What can ask the backbone about mixtures of the train rows. keep: the positions behind the input at which
        caches are to learn from them."""
        return Mixer(
            self.split,
            self.task,
            self.recording,
            self.train_rows,
            seed=self.seed,
            bfloat16=bfloat16,
            keep=keep,
            folder=self.workdir,
        )

    def mix(self, mixer: Mixer) -> None:
        """Have mixtures for those recipes that want them."""
        with bar("asking about mixtures", mixer.count, show=self.show) as progress:
            self.mixtures = mixer.ask(stopped=lambda: self.stop.requested, progress=progress)

    def add(self, cache: Cache, log: TrainingLog) -> None:
        """Judge a cache that has learned by other means than gradient steps, and add it to the candidates."""
        self.trained.append(self._judge(cache.eval(), log))

    def reread(self, trained: Trained, source: Cache) -> None:
        """Have a candidate read this one, which a request meets earlier, as if it had been built so: it has learned
        alone, so that only its blend is fitted, and it is judged, anew."""
        cache = cast(LearnedCache, trained.cache)
        cache.reads = source.name
        self._blend(cache)
        trained.logits_NC = self._logits(cache, self.judged_rows)
        self._choose_confidence(trained)

    def _train(self, cache: LearnedCache, recipe: Recipe, limit_s: float | None, progress: Bar) -> Trained:
        log = self._training(cache, recipe).run(time_limit_s=limit_s, stop=self.stop, progress=progress)
        self._save(cache, recipe, log)
        self._blend(cache)
        return self._judge(cache, log)

    def _training(self, cache: LearnedCache, recipe: Recipe) -> Training:
        return Training(
            cache,
            self.recording,
            self.position(cache),
            self.train_rows,
            recipe,
            mixtures=self.mixtures if recipe.mixtures else None,
            seed=self.seed,
            device=self.split.device,
        )

    def _judge(self, cache: Cache, log: TrainingLog) -> Trained:
        """Have the cache say what it says on the rows that judge it, and pick its confidence."""
        logits_NC = self._logits(cache, self.judged_rows)
        trained = Trained(cache, self.position(cache), self.judged_rows, logits_NC, log)
        self._choose_confidence(trained)
        return trained

    def _blend(self, cache: LearnedCache) -> None:
        """Weigh what the cache says itself and what it reads, if anything, on tune rows."""
        read, rows = self._read(cache), _thinned(self.tune_rows, BLEND_ROWS)
        if read is None:
            return
        cache.blend = ALONE
        own_NC, read_NC = self._logits(cache, rows), self._of_logits(read, rows, _of_own(lambda said_BC: said_BC))
        cache.blend = fit_blend(own_NC, read_NC, self.answer_N[rows])

    def _logits(self, cache: Cache, rows: NDArray[np.intp]) -> Tensor:
        """(len(rows), C) what a cache says on these of the rows that judge it."""
        read, device = self._read(cache), self.split.device
        on = None if read is None else read.on
        return cache_logits(cache, self.recording, self.position(cache), rows, on, device, self.workdir)

    def _read(self, cache: Cache) -> Trained | None:
        """The candidate that this one reads."""
        return None if cache.reads is None else self.named(cache.reads)

    def _choose_confidence(self, trained: Trained) -> None:
        agreement = self._agreement(self._answers(trained, self.tune_rows), self.tune_rows)
        scores = {
            name: self._of_logits(trained, self.tune_rows, _of_own(function)).double().numpy()
            for name, function in trained.cache.confidences().items()
        }
        if trained.cache.suits_selector:
            x_NF = self._of_logits(trained, self.tune_rows, statistics)
            scores["selector"] = _cross_fitted(x_NF, torch.from_numpy(agreement), self.seed)
        trained.auroc = {name: auroc(score, agreement) for name, score in scores.items()}
        best = self.confidence if self.confidence in scores else _clearly_best(trained.auroc)
        selector = None
        if best == "selector":
            selector = Selector.fitted(x_NF, torch.from_numpy(agreement))
        trained.cache.use_confidence(best, selector)
        trained.confidence_N = scores[best]

    # -- what the statistical half gets ------------------------------------------------------------

    def records(self, candidates: Sequence[Trained], part: int) -> Records:
        """What these candidates said about the tune or certify rows. On tune a learned selector is cross-fitted: each
        row is scored by a selector that has not seen it, as any later row will be. The two weights of a blend are not:
        they have seen it."""
        rows = self.tune_rows if part == TUNE else self.certify_rows
        names = [trained.cache.name for trained in candidates]
        confidence, answers, agreement = [], [], []
        for trained in candidates:
            if part == TUNE:
                confidence.append(trained.confidence_N)
            else:
                trained.cache.cpu()
                confidence.append(self._of_logits(trained, rows, trained.cache.confidence).double().numpy())
                trained.cache.to(self.split.device)
            answer_N = self._answers(trained, rows)
            answers.append(answer_N.numpy())
            agreement.append(self._agreement(answer_N, rows))
        labels = self.recording.label_N
        return Records(
            np.stack(confidence, axis=1),
            np.stack(answers, axis=1),
            np.stack(agreement, axis=1),
            self.answer_N[rows].numpy(),
            tuple(-1 if t.cache.reads is None else names.index(t.cache.reads) for t in candidates),
            None if labels is None else labels[rows],
        )

    def _answers(self, trained: Trained, rows: NDArray[np.intp]) -> Tensor:
        return self._of_logits(trained, rows, _of_own(self.task.answer))

    def _agreement(self, answer_N: Tensor, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        agree: NDArray[np.bool_] = self.task.agree(answer_N, self.answer_N[rows]).numpy()
        return agree

    def _of_logits(self, trained: Trained, rows: NDArray[np.intp], function: OfLogits) -> Tensor:
        """What the function makes of this candidate's logits on these rows and, where it reads any, those it reads."""
        read = self._read(trained.cache)
        parts = [function(trained.on(part), None if read is None else read.on(part)) for part in _chunks(rows)]
        return torch.cat(parts)

    def estimated_costs(self, candidates: Sequence[Trained]) -> CacheCosts:
        """In FLOPs: the caches' time is measured only once they are all there."""
        stages = np.array([stage.flops for stage in self.costs.stages])
        before = np.concatenate([[0.0], np.cumsum(stages)]) / stages.sum()
        cache = [self.flops_of(trained.cache) / self.flops for trained in candidates]
        return CacheCosts(np.array([before[trained.position] for trained in candidates]), np.array(cache))

    # -- resuming ----------------------------------------------------------------------------------

    @cached_property
    def _train_digest(self) -> str:
        """Of all train rows, so it takes a while."""
        return self.recording.fingerprint(TRAIN)

    def _file(self, cache: LearnedCache, recipe: Recipe) -> Path:
        assert self.store is not None
        # Decided after training, or no part of it.
        later = ("reads", "blend", "folded", "confidence", "selector_features")
        what = {
            "backbone": self.split.fingerprint,
            "data": self._train_digest,
            "seed": self.seed,
            "recipe": dataclasses.asdict(recipe),
            "cache": {name: value for name, value in cache.describe().items() if name not in later},
        }
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return self.store / f"{key}.safetensors"

    def _stored_log(self, cache: LearnedCache, recipe: Recipe) -> TrainingLog | None:
        """How the stored cache of this name and recipe was trained; None where there is none or it cannot be read."""
        if self.store is None:
            return None
        try:
            with safe_open(self._file(cache, recipe), "pt") as header:
                return TrainingLog(**json.loads(header.metadata()["log"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def _save(self, cache: LearnedCache, recipe: Recipe, log: TrainingLog) -> None:
        if self.store is None or self.stop.requested:  # half-trained is not what a later run should find
            return
        state = {name: value.detach().cpu().contiguous() for name, value in cache.state_dict().items()}
        _store(self._file(cache, recipe), state, {"log": json.dumps(dataclasses.asdict(log))})

    def _load(self, cache: LearnedCache, recipe: Recipe, limit_s: float | None) -> Trained | None:
        """The stored cache, if its training was complete or as long as it would be now."""
        log = self._stored_log(cache, recipe)
        if log is None or (log.steps < recipe.steps and (limit_s is None or log.seconds < 0.5 * limit_s)):
            return None
        ready = LearnedCache.described(cache.describe() | {"folded": True})
        ready.load_state_dict(load_file(self._file(cache, recipe)))
        ready.to(self.split.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ready.requires_grad_(requires_grad=False)
        self._blend(ready)
        return self._judge(ready, log)


def _store(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """All of it or nothing."""
    temporary = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"could not keep what was learned in {file.parent}: {error}. Free some space, or choose another `workdir=`."
        ) from error


def _of_own(function: Callable[[Tensor], Tensor]) -> OfLogits:
    return lambda own_BC, _: function(own_BC)


def _chunks(rows: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    return (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS))


def _thinned(rows: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    """At most so many of these rows, from the first to the last: traffic may change along a stream."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.intp)]


def _clearly_best(auroc: Mapping[str, float]) -> str:
    """The first of these scores, unless another one ranks clearly better."""
    ranking = {name: np.nan_to_num(value, nan=0.0) for name, value in auroc.items()}
    first, best = next(iter(ranking)), max(ranking, key=lambda name: ranking[name])
    return best if ranking[best] > ranking[first] + CLEARLY else first


def _cross_fitted(x_NF: Tensor, agreement_N: Tensor, seed: int, folds: int = 5) -> NDArray[np.float64]:
    """(N,) scores of the learned selector, each row by a selector fitted on the other folds."""
    fold_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(x_NF)) % folds)
    score_N = torch.zeros(len(x_NF), dtype=torch.float64)
    for fold in range(folds):
        inside = fold_N != fold
        if inside.any() and (~inside).any():
            selector = Selector.fitted(x_NF[inside], agreement_N[inside])
            score_N[~inside] = selector.score(x_NF[~inside]).double()
    return score_N.numpy()
