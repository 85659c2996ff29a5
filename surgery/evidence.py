"""What a differential run found out: result types only, no verdicts and no IO.

Corners are named as in the picture of the README: `T_o`, `T_e` are the original and the edited
model in PyTorch, `R_o`, `R_e` the same two in ONNX Runtime. Floats may be NaN or infinite; that
is evidence too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CORNERS = ("T_o", "T_e", "R_o", "R_e")
EDGES = {"C_o": ("T_o", "R_o"), "C_e": ("T_e", "R_e")}
EDITS = {"T": ("T_o", "T_e"), "R": ("R_o", "R_e")}
PAIRS = {**EDGES, **EDITS}
"""What is compared with what: each model with its conversion, and each edit in its runtime."""

KL_LEVELS = ("0.1%", "1%", "5%", "10%", "median", "90%", "95%", "99%", "99.9%")
DELTA_LEVELS = ("0.1%", "1%", "5%", "10%", "25%", "median", "75%", "90%", "95%", "99%", "99.9%")
"""Percentiles that `Divergence` holds, from the lowest; `min` comes before them, `max` after."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    stage: where in the chain (`load`, `run`, `interface`, `embedding`, `lineage`, `conversion`,
    `tolerance`, `interaction`, `preserve`, `target`, `coverage`; of a localisation `capture`,
    `translate`, `optimise`, `kernel`, `localize`); symptom: what kind (`crash`, `timeout`,
    `nan`, `missing output`, `shape`, `dtype`, `wrong value`, `stale tensor`, ...); site: which
    corner, tensor, output or batch; value and limit: the number found and the one allowed;
    operator: the kind of the operator at fault and how it differs, where that was found.
    """

    stage: str
    symptom: str
    site: str
    message: str
    value: float | None = None
    limit: float | None = None
    operator: str = ""


@dataclass(frozen=True)
class Corner:
    """One model in one runtime: what ran, whether it ran to its end, and if not, why (`detail`).

    `seconds` is wall time and `peak_bytes` peak resident memory of the child process.
    """

    runtime: str
    model: str
    status: str  # "ok", "crash", "timeout", "error"
    seconds: float
    peak_bytes: int
    batches: int
    detail: str = ""


@dataclass(frozen=True)
class Conversion:
    """The error of one conversion edge for one output, over every kept real position.

    Differences are ONNX Runtime minus PyTorch float32. `noise_*` are PyTorch float32 against
    the float64 reference on the same positions; `ratio_max` and `ratio_l2` are the errors of
    ONNX Runtime against that reference, divided by the noise (worst element, and L2 norm);
    `ratio_position` is the largest of one position's error over that position's own noise.
    `kl` is the mean KL(PyTorch || ONNX Runtime) in nats per token and `flips` the number of
    top-1 changes; both are None for outputs that are not logits.
    """

    edge: str
    output: str
    positions: int
    elements: int
    max_abs: float
    mean_abs: float
    max_rel: float
    mean_rel: float
    cosine: float
    kl: float | None
    flips: int | None
    noise_max: float
    noise_l2: float
    ratio_max: float
    ratio_l2: float
    ratio_position: float
    worst: str

    @property
    def ratio(self) -> float:
        """The largest of the ratios; NaN where one of them is none."""
        ratios = (self.ratio_max, self.ratio_l2, self.ratio_position)
        return max(ratios) if all(ratio >= 0 for ratio in ratios) else math.nan


@dataclass(frozen=True)
class ErrorShape:
    """How noise and error are distributed, for one edge and output, each in units of the noise of
    its own position (the root mean square over the position's features).

    `dtype` is what the graph computes in and so what PyTorch's noise is the noise of; `overlap`
    is the Bhattacharyya coefficient of both distributions, 0 to 1; `sigma_ratio` is the error's
    sigma over the noise's, both about zero. `noise_*` are PyTorch's errors against the float64
    reference, `error_*` ONNX Runtime's: mean, sigma, and quantiles of the absolute value.
    """

    edge: str
    output: str
    dtype: str
    elements: int
    overlap: float
    sigma_ratio: float
    noise_mean: float
    noise_sigma: float
    noise_median: float
    noise_p99: float
    noise_max: float
    error_mean: float
    error_sigma: float
    error_median: float
    error_p99: float
    error_max: float


@dataclass(frozen=True)
class Tolerance:
    """The smallest tolerances one edge's output would pass, as |r - t| <= atol + rtol |t|.

    `rtol` with atol 0, `atol` with rtol 0, and `both` with rtol = atol; infinite where none is
    large enough. `outside`: the number of elements beyond each of `surgery.presets`.
    """

    edge: str
    output: str
    elements: int
    rtol: float
    atol: float
    both: float
    outside: dict[str, int]


@dataclass(frozen=True)
class Repeat:
    """An A/A run: one corner's model again, one thing about the run changed, against the corner.

    kind: `run` (threads, attention, optimisation: the same numbers but for rounding), `storage`
    (weights rounded to `variant`'s type) or `compute` (all computed in it); `nonfinite` counts
    values that are no numbers only in one of the two, which the rest leaves out. `max_abs` and
    `l2` are of the difference; `median`, `p99` and `max` are its absolute value in units of the
    position's own noise; `ratio_max` and `ratio_l2` are over the output's float64 noise.
    """

    corner: str
    variant: str
    kind: str
    output: str
    positions: int
    nonfinite: int
    max_abs: float
    l2: float
    median: float
    p99: float
    max: float
    ratio_max: float
    ratio_l2: float


@dataclass(frozen=True)
class Interaction:
    """I = (R_e - R_o) - (T_e - T_o) against E = T_e - T_o on one stimulus set, in float64.

    `effect` and `norm` are L2 norms of E and I over the kept real positions, `ratio` is
    norm / effect, `rho` is <I,E>/<E,E> (-1: the edit was lost, -0.5: half lost, +1: applied
    twice), `noise` is the L2 norm that rounding alone explains, `noise_ratio` = norm / noise.
    """

    stimulus_set: str
    output: str
    effect: float
    norm: float
    ratio: float
    rho: float
    noise: float
    noise_ratio: float


@dataclass(frozen=True)
class StimulusInteraction:
    """As `Interaction`, of one stimulus; only the worst of a set are kept."""

    stimulus_set: str
    stimulus: str
    effect: float
    ratio: float
    rho: float
    noise_ratio: float


@dataclass(frozen=True)
class SiteInteraction:
    """The interaction where a module of `layer` gives or takes its values, on one batch.

    `effect`, `ratio` and `rho` are those of the four runs as they are, as in `Interaction`. The
    same with `own_` before is of the one module before the site: all four models get the values
    that PyTorch gives in the edited model, so that what an edit does elsewhere counts for nothing.
    `own_noise_ratio` is that ||I|| over noise. `wrong`: the module makes something else of the
    edit in ONNX Runtime; `word`: what (`survived`, `the edit was lost`, ...), empty where the
    module's own effect is within noise.
    """

    site: str
    layer: int | None
    effect: float
    ratio: float
    rho: float
    own_effect: float
    own_ratio: float
    own_rho: float
    own_noise_ratio: float
    wrong: bool
    word: str


@dataclass(frozen=True)
class Effect:
    """One behaviour metric at every corner that ran, on one stimulus set.

    `method` names what the number depends on beside its definition, such as a detector; changes
    of a `relative` metric are shares of what it was.
    """

    metric: str
    stimulus_set: str
    count: int
    corners: dict[str, float]
    unit: str
    method: str = ""
    relative: bool = False

    def change(self, runtime: str) -> float:
        """Edited minus original, of a relative metric edited over original less 1, in one runtime:
        `"T"` (PyTorch) or `"R"` (ONNX Runtime)."""
        return self.step(f"{runtime}_o", f"{runtime}_e")

    def step(self, one: str, other: str) -> float:
        """As `change`, from any corner to any other; NaN where one of them is missing."""
        missing = float("nan")
        before, after = self.corners.get(one, missing), self.corners.get(other, missing)
        if not self.relative:
            return after - before
        return after / before - 1 if before else missing


@dataclass(frozen=True)
class Drift:
    """How far the edit moved one stimulus set: KL(original || edited) and top-1 flips.

    `runtime` is `"T"` or `"R"`; `kl` in nats per token, `flip_rate` a share of positions.
    """

    stimulus_set: str
    runtime: str
    positions: int
    kl: float
    flip_rate: float


@dataclass(frozen=True)
class LayerError:
    """One part of a model that was streamed, from what the norm `begin` reads to what `end` does.

    `noise` is PyTorch float32 against float64 at `end`, the largest difference. In units of it,
    `introduced` is how far ONNX Runtime is from PyTorch there when it starts from PyTorch's values
    at `begin`, and `propagated` how far when it starts from its own.
    """

    edge: str
    begin: str
    end: str
    noise: float
    introduced: float
    propagated: float


@dataclass(frozen=True)
class Divergence:
    """How the next-token distributions of a pair (`PAIRS`, p then q) differ on one stimulus set.

    `kl` is `metrics.summary.kl_table` of KL(p || q) in nats over `positions`. `flips` positions
    have another most likely token; `near_ties` of them may be rounding (`metrics.flips`).
    `perplexity` and `delta_p` are the tables of the text's own next tokens, of which there are
    `tokens`; empty where there are none.
    """

    stimulus_set: str
    pair: str
    positions: int
    kl: dict[str, float]
    flips: int
    near_ties: int
    tokens: int
    perplexity: dict[str, float]
    delta_p: dict[str, float]


@dataclass(frozen=True)
class Parting:
    """Where the greedy responses of a pair part, on one stimulus set.

    Of `responses` prompts, `parted` have unlike responses, `near_ties` of them at a token that
    rounding may have turned. `first` and `median` are positions in the response, from 0, over
    those that part; None where none does.
    """

    stimulus_set: str
    pair: str
    responses: int
    parted: int
    near_ties: int
    first: int | None
    median: float | None


@dataclass(frozen=True)
class Interval:
    """What `confidence` leaves open about one number of a pair on one stimulus set.

    `quantity`: `kl`, its `kl_median` and `kl_99%`, `log_ratio`, `flip_rate` or `real_flip_rate` of
    `Divergence`, `parted_rate` of `Parting`, or the metric of an `Effect`, whose change in `"T"` or
    `"R"` it is. `count` texts (of `flip_rate` and `real_flip_rate` positions) were measured;
    low <= estimate <= high.
    """

    quantity: str
    stimulus_set: str
    pair: str
    count: int
    confidence: float
    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Evidence:
    """Everything one differential run measured. `faults` need no policy to be wrong."""

    corners: dict[str, Corner]
    conversion: tuple[Conversion, ...] = ()
    interaction: tuple[Interaction, ...] = ()
    effects: tuple[Effect, ...] = ()
    drift: tuple[Drift, ...] = ()
    divergence: tuple[Divergence, ...] = ()
    partings: tuple[Parting, ...] = ()
    intervals: tuple[Interval, ...] = ()
    stimuli: tuple[StimulusInteraction, ...] = ()
    sites: tuple[SiteInteraction, ...] = ()
    faults: tuple[Finding, ...] = ()
    compared: int = 0
    covered_rows: int = 0
    layers: tuple[LayerError, ...] = ()
    shapes: tuple[ErrorShape, ...] = ()
    tolerances: tuple[Tolerance, ...] = ()
    repeats: tuple[Repeat, ...] = ()
