"""Latency of networks, side by side: one run, interleaved rounds, paired ratios.

Absolute times of a shared machine drift by more than the effects that matter here. So
all networks of a run are timed in turn (A B C A B C ...), a ratio is taken within each
round, and the median over rounds is reported with its spread. A network is compared
with the same network at a lower resolution, and a converted network with its control,
itself without the parts of its method: no part can be cheaper than none.

Latency does not depend on the values of weights and images, as long as these are
ordinary numbers: neither denormal (slow on a CPU) nor zero (a GPU then draws less
power and clocks higher). Networks made here by name have random weights like that.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from pliant.deploy.engines import ENGINES, named
from pliant.measuring.candidates import Candidate, Model, Size, add_baseline, attempt, by_name, variants
from pliant.measuring.rows import (
    AS_BUILT,
    AS_IS,
    FORMS,
    NATIVE,
    OPTIMIZED,
    PLAIN_FORM,
    Measurement,
    is_control,
)
from pliant.measuring.running import Limits, Setting, count, run, setting_of
from pliant.measuring.writing import Files
from pliant.provenance import provenance
from pliant.tables import undecided

Progress = Callable[[int, int, str], None]

NOT_FASTER = "operations fell, time did not"
PERHAPS_FASTER = "operations fell, time not beyond its spread"


def measure(
    models: Model | Sequence[Model] | Mapping[str, Model],
    *,
    against: Model | None = None,
    input_size: int | Size | None = None,
    batch: int | Sequence[int] = 1,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | Sequence[str | torch.dtype] = "float32",
    channels_last: bool | None = None,
    engine: str = "eager",
    engines: str | Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    threads: int | None = None,
    rounds: int = 15,
    min_run_time: float = 0.1,
    max_run_time: float | None = None,
    max_prepare_time: float | None = None,
    timeout: float = 300.0,
    write_timeout: float = 600.0,
    tax: bool = True,
    lower_resolution: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    done: Callable[[list[Measurement]], object] | None = None,
) -> list[Measurement]:
    """Time networks side by side, in evaluation mode.

    All networks of one engine, batch and dtype are one run: they are timed in turn in each
    round; on a GPU, the calls of one network in one round are queued, and awaited
    together. A network that fails (it cannot be built, exported or compiled, runs out of
    memory, takes its engine down) costs its own row, which says why, not the table.
    Exporting and compiling are not in the time. Networks that are passed in are copied,
    not changed.

    With `engines`, networks are as one would deploy them, all equally optimised: norms
    folded, channels_last. A network whose parts have forms for engines (Mixture-of-Depths
    blocks have) is timed twice, with its parts as they are written (``plain``) and in the
    engine's best form (``optimized``), in ONNX Runtime a third time, compiled for this machine
    (``native``).

    Args:
        models: names that ``timm.create_model`` knows (random weights), paths of files that
            `pliant.export` wrote (each runs in its own engine), or networks,
            or a mapping of names to either.
        against: the baseline, in the same form, or the name of one of `models`; it is
            timed too. None: no ratios.
        input_size: channels, height and width, or pixels alone. By default each
            network's own; rows state it.
        batch: images of a forward; several batches are a run each.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, ``bfloat16`` or ``float16``: of weights and images where
            PyTorch runs the network, else that in which the engine computes; ``int8`` in
            ONNX Runtime and OpenVINO (`pliant.deploy.int8`). Several are a run each.
        channels_last: memory format of weights and images; by default only with `engines`.
        engine: the one engine in which networks are timed as they are, such as ``eager`` or
            ``compiled`` (`torch.compile`; with CUDA graphs on a GPU).
        engines: instead of it, names in `pliant.deploy.engines.ENGINES`, or ``"all"``. One
            that is not installed, or cannot do a dtype, gives rows that say so.
        forms: forms of the networks: ``as built`` (the default with `engine`), ``plain``,
            ``optimized``, and ``native``, which only ONNX Runtime has (the defaults with
            `engines`).
        threads: threads of PyTorch's pool and of each engine's. By default `torch.get_num_threads`.
        rounds: how often each network is timed.
        min_run_time: seconds that one network runs in one round, at least.
        max_run_time: seconds after which no further round of a run begins (three are
            always run). Building and compiling do not count.
        max_prepare_time: seconds after which no further network of a run is begun to be
            compiled and warmed up: the rows of those that are left say so. The first always is.
        timeout: seconds that an engine in a process of its own may take to load and warm up
            a network, or for one round of one.
        write_timeout: seconds that it may take there to write the file of a network: to export
            or compile it. AOTInductor takes some 10 s for a ResNet-50, and minutes for large networks.
        tax: time the controls of each converted network too (`Method.without`), one for each method that
            has one. The tax is over the first.
        lower_resolution: pixels at which the baseline is timed too, for comparison.
        seed: seed of random weights and images; the caller's generators are left alone.
        progress: called with steps done, steps in all, and what comes next.
        done: called with the rows of a run as soon as it is over, so that they can be kept
            whatever happens to the next.

    Returns:
        A row for each network and variant, run after run; the baseline first unless it is
        among `models`, each variant after its network.

    Raises:
        ValueError: an unknown network, engine, form, dtype or device; a number that makes
            no sense; a network that does not say its input size, when none is given; or
            no engine that can run here.

    Example:
        >>> rows = measure("resnet20_cifar_mod", against="resnet20_cifar", rounds=1, min_run_time=0)
        >>> [row.label for row in rows]
        ['resnet20_cifar', 'resnet20_cifar_mod', 'resnet20_cifar_mod without MoD blocks']
        >>> rows[0].time_ratio, round(rows[1].mac_ratio, 2)
        (1.0, 0.65)
    """
    deployed = engines is not None
    last = deployed if channels_last is None else channels_last
    usual = (PLAIN_FORM, OPTIMIZED, NATIVE) if deployed else (AS_BUILT,)
    wanted = usual if forms is None else tuple(forms)
    limits = Limits(rounds, min_run_time, max_run_time, max_prepare_time, timeout, write_timeout)
    # An engine's batches stand together: what it compiled for one is at hand for the next.
    settings = [
        setting_of(b, device, d, last, e.name, threads)
        for e, d, b in product(
            named(engine if engines is None else engines), _several(dtype), _several(batch)
        )
    ]
    _check(limits, wanted, settings)
    models_by_name = by_name(models)
    base = None if against is None else add_baseline(models_by_name, against)
    if lower_resolution is not None and base is None:
        raise ValueError("lower_resolution is that of the baseline: name one with `against`")

    found: list[Measurement] = []
    gpus = [s.device for s in settings[:1] if s.device.type == "cuda"]
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        lineup: list[Candidate] = []
        for name, model in models_by_name.items():
            low = lower_resolution if name == base else None
            lineup += variants(name, model, input_size, low, tax, wanted)
        if deployed and (opened := [c.model for c in lineup if c.file is not None]):
            raise ValueError(
                f"{opened[0]} is an exported file, which has its own engine; leave out engines="
            )
        for candidate in (c for c in lineup if c.file is None):
            attempt(candidate, count)
        steps = len(lineup) * (1 + rounds)
        total = len(settings) * steps
        report = progress or (lambda _done, _total, _what: None)
        # What an engine has mapped cannot be removed everywhere.
        with tempfile.TemporaryDirectory(prefix="pliant-", ignore_cleanup_errors=True) as folder:
            files = Files(Path(folder))
            for n, setting in enumerate(settings):
                candidates = [
                    replace(c, seconds=[]) for c in lineup if c.form != NATIVE or setting.has_native
                ]

                def told(step: int, what: str, before: int = n * steps) -> None:
                    report(before + step, total, what)

                run(candidates, setting, limits, files, told)
                origin = provenance(setting.device)
                rows = [_row(c, candidates, base, setting, origin) for c in candidates]
                found += rows
                if done is not None:
                    done(rows)
        report(total, total, "done")
    return found


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, (int, str, torch.dtype)) else list(value)


def _check(limits: Limits, forms: Sequence[str], settings: Sequence[Setting]) -> None:
    for name in ("rounds", "min_run_time"):
        number, least = getattr(limits, name), 1 if name == "rounds" else 0
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")
    for form in forms:
        if form not in FORMS:
            raise ValueError(f"no form {form!r}; the forms are {', '.join(FORMS)}")
    if not forms or not settings:
        raise ValueError("forms, batch and dtype must name at least one each")
    if set(forms) == {NATIVE} and not any(setting.has_native for setting in settings):
        raise ValueError(f"none of these engines has the form {NATIVE!r}; onnxruntime has")
    unfit = [setting.unfit for setting in settings]
    if all(unfit):
        raise ValueError("; ".join(dict.fromkeys(unfit)))


def _row(
    candidate: Candidate,
    candidates: list[Candidate],
    base: str | None,
    setting: Setting,
    origin: Mapping[str, Any],
) -> Measurement:
    """All that is known of one candidate beside the others."""
    engine = ENGINES[candidate.engine] if candidate.engine else setting.engine
    beside = [c for c in candidates if c.form == candidate.reference_form]
    baseline = next((c for c in beside if (c.model, c.variant) == (base, AS_IS)), None)
    control = next((c for c in beside if is_control(c.variant) and c.model == candidate.model), None)
    ms = [1000 * s for s in candidate.seconds]
    ratios = _paired(candidate, baseline)
    taxes = [r - 1 for r in _paired(candidate, control)] if candidate.variant == AS_IS else []
    macs = candidate.macs / baseline.macs if baseline and baseline.macs and candidate.macs else None
    notes = [candidate.note] if candidate.note else []
    if macs is not None and macs < 1 and ratios and not undecided(median(ratios), spread(ratios)):
        _, middle, high = _quartiles(ratios)
        notes += [NOT_FASTER] if middle >= 1 else [PERHAPS_FASTER] if high >= 1 else []
    if baseline and baseline.error and not candidate.error:
        notes.append("the baseline failed: no ratio")
    return Measurement(
        model=candidate.model,
        variant=candidate.variant,
        parameters=candidate.parameters,
        macs=candidate.macs,
        input_size=candidate.size,
        batch=setting.batch,
        device=setting.device.type,
        engine=engine.name,
        dtype=candidate.precision or setting.precision,
        channels_last=setting.channels_last and candidate.file is None,
        threads=setting.threads,
        rounds=len(ms),
        median_ms=median(ms),
        iqr_ms=spread(ms),
        min_ms=_rounded(min(ms)) if ms else None,
        max_ms=_rounded(max(ms)) if ms else None,
        against=base or "",
        time_ratio=median(ratios),
        time_ratio_iqr=spread(ratios),
        mac_ratio=None if macs is None else _rounded(macs),
        tax=median(taxes),
        tax_iqr=spread(taxes),
        note="; ".join(notes),
        error=candidate.error,
        form=candidate.form,
        runtime=engine.version,
        **origin,
    )


def _paired(candidate: Candidate, other: Candidate | None) -> list[float]:
    """Times over the other's in the same round; empty if one of the two has none."""
    if other is None or not candidate.seconds or not other.seconds:
        return []
    return [a / b for a, b in zip(candidate.seconds, other.seconds, strict=True)]


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def median(values: list[float]) -> float | None:
    """The median of times or ratios, to the digits that a clock gives; None of none."""
    return _rounded(_quartiles(values)[1]) if values else None


def spread(values: list[float]) -> float | None:
    """Their interquartile range; one round has none."""
    if len(values) < 2:
        return None
    low, _, high = _quartiles(values)
    return _rounded(high - low)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # a clock gives no more
