"""Measuring: who is timed in which order, what is computed from times, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from _measure import SMALL, conv
from pliant.counting import count_macs, count_parameters
from pliant.deploy.engines import ENGINES
from pliant.measuring import candidates
from pliant.measuring.latency import NOT_FASTER, PERHAPS_FASTER, measure
from pliant.measuring.rows import LOWER_RESOLUTION, Measurement
from pliant.methods.mixture_of_depths import without_mod_blocks
from pliant.methods.mixture_of_depths.method import NO_BLOCKS


def test_networks_are_timed_in_turn(clock: SimpleNamespace) -> None:
    models = {"a": conv(), "b": conv(), "c": conv()}
    measure(models, input_size=SMALL, rounds=2, threads=3, min_run_time=0)
    order = [(number, turn) for number, turn, _ in clock.calls]
    warm_up = [(0, -2), (0, -1), (1, -2), (1, -1), (2, -2), (2, -1)]
    assert order == warm_up + [(n, t) for t in (0, 1) for n in (0, 1, 2)]
    assert clock.threads == [3, 3, 3]


def test_calls_a_round_fill_the_least_run_time(clock: SimpleNamespace) -> None:
    clock.times = lambda entrant, turn: 0.03 if entrant == 0 else 0.5
    measure({"a": conv(), "b": conv()}, input_size=SMALL, rounds=1, min_run_time=0.1)
    assert [c for c in clock.calls if c[1] == 0] == [(0, 0, 4), (1, 0, 1)]


def test_a_ratio_is_taken_within_a_round(clock: SimpleNamespace) -> None:
    # The machine slows down threefold; the ratio of the two is always 1.5.
    clock.times = lambda entrant, turn: (1 + max(turn, 0)) * (0.002 if entrant == 0 else 0.003)
    base, row = measure({"a": conv(), "b": conv()}, against="a", input_size=SMALL, rounds=3)
    assert (row.median_ms, row.min_ms, row.max_ms, row.iqr_ms) == (6.0, 3.0, 9.0, 3.0)
    assert (row.time_ratio, row.time_ratio_iqr) == (1.5, 0.0)
    assert row.speedup == pytest.approx(2 / 3)
    assert (base.time_ratio, base.speedup, base.mac_ratio) == (1.0, 1.0, 1.0)
    assert row.rounds == 3
    assert row.against == "a"


def test_rows_are_told_run_by_run(clock: SimpleNamespace) -> None:
    told: list[list[Measurement]] = []
    rows = measure({"a": conv(), "b": conv()}, input_size=SMALL, batch=(1, 2), rounds=1, done=told.append)
    assert [[r.batch for r in some] for some in told] == [[1, 1], [2, 2]]
    assert [r for some in told for r in some] == rows


def test_spread_of_ratios_is_their_interquartile_range(clock: SimpleNamespace) -> None:
    clock.times = lambda entrant, turn: 1.0 if entrant == 0 else (1.0, 1.1, 1.2, 1.3, 1.9)[max(turn, 0)]
    _, row = measure({"a": conv(), "b": conv()}, against="a", input_size=SMALL, rounds=5)
    assert row.time_ratio == pytest.approx(1.2)
    assert row.time_ratio_iqr == pytest.approx(0.2)


def test_one_round_has_no_spread(clock: SimpleNamespace) -> None:
    (row,) = measure({"a": conv()}, input_size=SMALL, rounds=1)
    assert row.median_ms == 1000.0
    assert row.iqr_ms is None


def test_tax_is_over_the_same_network_without_its_blocks(clock: SimpleNamespace) -> None:
    # In order: baseline, MoD network, that without blocks.
    clock.times = lambda entrant, turn: (2.0, 1.2, 1.0)[entrant] * (1 + max(turn, 0))
    rows = measure("resnet20_cifar_mod", against="resnet20_cifar", rounds=3)
    assert [(r.model, r.variant) for r in rows] == [
        ("resnet20_cifar", "network"),
        ("resnet20_cifar_mod", "network"),
        ("resnet20_cifar_mod", NO_BLOCKS),
    ]
    assert rows[1].tax == pytest.approx(0.2)
    assert rows[1].tax_iqr == 0.0
    assert [r.tax for r in (rows[0], rows[2])] == [None, None]
    bare = without_mod_blocks(timm.create_model("resnet20_cifar_mod"))
    assert rows[2].parameters == count_parameters(bare)
    assert rows[2].macs == count_macs(bare, (3, 32, 32))
    assert rows[2].time_ratio == pytest.approx(0.5)


def test_no_tax_wanted(clock: SimpleNamespace) -> None:
    (row,) = measure("resnet20_cifar_mod", rounds=1, tax=False)
    assert row.tax is None
    assert row.time_ratio is None
    assert row.against == ""


@pytest.mark.parametrize(
    ("ratios", "note"),
    [((0.8, 0.8, 0.8), ""), ((0.9, 0.9, 1.2), PERHAPS_FASTER), ((1.0, 1.0, 1.0), NOT_FASTER)],
)
def test_fewer_operations_without_less_time_are_marked(
    clock: SimpleNamespace, ratios: tuple[float, ...], note: str
) -> None:
    clock.times = lambda entrant, turn: 1.0 if entrant == 0 else ratios[max(turn, 0)]
    base, row = measure({"wide": conv(8), "narrow": conv(4)}, against="wide", input_size=SMALL, rounds=3)
    assert row.mac_ratio == 0.5
    assert row.note == note
    assert base.note == ""


def test_more_operations_and_more_time_are_no_surprise(clock: SimpleNamespace) -> None:
    clock.times = lambda entrant, turn: 1.0 + entrant
    rows = measure({"narrow": conv(4), "wide": conv(8)}, against="narrow", input_size=SMALL, rounds=2)
    assert rows[1].mac_ratio == 2.0
    assert rows[1].note == ""


def test_baseline_at_a_lower_resolution(clock: SimpleNamespace) -> None:
    clock.times = lambda entrant, turn: (1.0, 0.5, 0.7)[entrant]
    model = conv()
    rows = measure({"m": conv(2)}, against=model, input_size=SMALL, lower_resolution=5, rounds=2)
    assert [r.variant for r in rows] == ["network", LOWER_RESOLUTION, "network"]
    assert rows[1].input_size == (1, 5, 5)
    assert rows[1].label == "Sequential at 5 px"
    assert rows[1].macs == count_macs(model, (1, 5, 5)) == 4 * 9 * 9
    assert rows[1].time_ratio == 0.5
    assert rows[2].time_ratio == 0.7


def test_no_further_round_after_the_time_is_up(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr("pliant.measuring.running.time.monotonic", lambda: next(now))
    # It is read as preparing starts, as rounds start, and after each round: 10 s each.
    (row,) = measure({"a": conv()}, input_size=SMALL, rounds=50, max_run_time=45)
    assert row.rounds == 5
    (row,) = measure({"a": conv()}, input_size=SMALL, rounds=50, max_run_time=1)
    assert row.rounds == 3


def test_no_further_network_is_prepared_after_the_time_is_up(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr("pliant.measuring.running.time.monotonic", lambda: next(now))
    models = {name: conv() for name in "abcd"}
    rows = measure(models, input_size=SMALL, rounds=2, max_prepare_time=25)
    assert [row.error for row in rows] == ["", "", "", "left out: preparing took over 25 s"]
    assert [row.rounds for row in rows] == [2, 2, 2, 0]


def test_progress_counts_to_the_end(clock: SimpleNamespace) -> None:
    told: list[tuple[int, int, str]] = []
    measure({"a": conv(), "b": conv()}, input_size=SMALL, rounds=2, progress=lambda *t: told.append(t))
    assert [t[0] for t in told] == list(range(7))
    assert {t[1] for t in told} == {6}
    assert told[0][2] == "preparing a"
    assert told[-1][2] == "done"


class Fails(nn.Module):
    """Works so many times (once it is counted, too), then does not."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of luck in /home/someone/secret/file.py\nand more")
        return x * self.weight


@pytest.mark.parametrize("after", [0, 1, 4])  # counting; warming up; the second round
def test_a_failing_network_costs_its_row_only(clock: SimpleNamespace, after: int) -> None:
    models = {"a": conv(), "bad": Fails(after), "c": conv()}
    rows = measure(models, against="a", input_size=SMALL, rounds=3)
    assert [r.rounds for r in rows] == [3, 0, 3]
    assert rows[1].error == "RuntimeError: out of luck in file.py"
    assert rows[1].median_ms is rows[1].time_ratio is rows[1].iqr_ms is None
    assert [r.error for r in (rows[0], rows[2])] == ["", ""]
    assert rows[2].time_ratio == 1.0


def test_a_failing_baseline_costs_the_ratios(clock: SimpleNamespace) -> None:
    rows = measure({"a": conv()}, against=Fails(0), input_size=SMALL, rounds=1)
    assert rows[1].median_ms == 1000.0
    assert rows[1].time_ratio is None
    assert rows[1].note == "the baseline failed: no ratio"


def test_without_a_compiler_the_compiled_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class InvalidCxxCompilerError(RuntimeError):
        pass

    def compiled(*_args: object, **_kwargs: object) -> Callable[..., None]:
        def run(_x: object) -> None:
            raise InvalidCxxCompilerError("InvalidCxxCompiler: No working C++ compiler found in /opt/x")

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    (row,) = measure({"a": conv()}, input_size=SMALL, engine="compiled", rounds=1)
    assert row.error == "no C++ compiler found; torch.compile needs one, for example g++"
    assert row.median_ms is None
    assert row.macs == count_macs(conv(), SMALL)


def test_compiling_is_for_one_size_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as config

    given: list[object] = []

    def compiled(model: nn.Module, *, mode: str | None = None, dynamic: bool) -> Callable[..., None]:
        given.append((mode, dynamic))
        return lambda _x: given.append((config.freezing, torch.get_num_threads()))

    monkeypatch.setattr(torch, "compile", compiled)
    threads = torch.get_num_threads()
    for name, frozen in (("compile", True), ("compiled", False)):
        given.clear()
        ENGINES[name].prepare(conv(), torch.ones(1, *SMALL), threads=3)
        assert given == [(None, False), (frozen, 3), (frozen, 3)]
    assert not config.freezing
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_ten_networks_compile_side_by_side() -> None:
    # The default cache of compiled code holds eight for a forward that all share.
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width, 1, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight.sum(0)

    models = {str(n): Net(n) for n in range(1, 11)}
    rows = measure(models, input_size=SMALL, engine="compiled", rounds=1, min_run_time=0)
    if any("compiler" in row.error for row in rows):
        pytest.skip("no C++ compiler on this machine")
    assert [row.error for row in rows] == [""] * 10


def test_networks_threads_and_generators_are_left_as_they_were() -> None:
    model = conv().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    (row,) = measure(
        model, input_size=SMALL, dtype="bfloat16", channels_last=True, rounds=1, threads=2, min_run_time=0
    )
    assert (row.dtype, row.channels_last, row.threads) == ("bfloat16", True, 2)
    assert row.median_ms is not None
    assert model.training
    assert not model[1].training
    assert model[0].weight.dtype == torch.float32
    assert model[0].weight.is_contiguous()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)


def test_threads_are_in_force_and_gradients_off_while_timed() -> None:
    seen: list[tuple[int, bool, bool, torch.Size, torch.dtype]] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(
                (
                    torch.get_num_threads(),
                    torch.is_inference_mode_enabled(),
                    self.training,
                    x.shape,
                    x.dtype,
                )
            )
            return x

    measure(Spy(), input_size=SMALL, batch=3, threads=2, rounds=1, min_run_time=0)
    counted, *timed = seen
    assert counted[3] == (1, *SMALL)
    assert set(timed) == {(2, True, False, torch.Size((3, *SMALL)), torch.float32)}


def test_random_networks_have_no_zero_branches() -> None:
    network = candidates.fresh("resnet20_cifar_mod")
    assert all(p.any() for n, p in network.named_parameters() if n.endswith("weight"))


def test_input_sizes(clock: SimpleNamespace) -> None:
    def sizes(**options: object) -> list[object]:
        return [r.input_size for r in measure("resnet20_cifar", rounds=1, **options)]  # type: ignore[arg-type]

    assert sizes() == [(3, 32, 32)]
    assert sizes(input_size=16) == [(3, 16, 16)]
    assert sizes(input_size=(3, 16, 24)) == [(3, 16, 24)]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ("resnet20_ciphar", {}, "timm has no network 'resnet20_ciphar'; did you mean resnet20_cifar"),
        ("resnet20_cifar", {"against": "nothing"}, "timm has no network 'nothing'"),
        ([], {}, "no model given"),
        (["resnet20_cifar"] * 2, {}, "two models are named 'resnet20_cifar'"),
        ("resnet20_cifar", {"batch": 0}, "batch must be at least 1, not 0"),
        ("resnet20_cifar", {"threads": 0}, "threads must be at least 1, not 0"),
        ("resnet20_cifar", {"rounds": 0}, "rounds must be at least 1, not 0"),
        ("resnet20_cifar", {"min_run_time": -1}, "min_run_time must be at least 0, not -1"),
        ("resnet20_cifar", {"engine": "onnx"}, "no engine 'onnx'; the engines are eager, compile, aoti,"),
        ("resnet20_cifar", {"dtype": "int7"}, "no dtype 'int7'"),
        ("resnet20_cifar", {"device": "gpu"}, "no device 'gpu'"),
        ("resnet20_cifar", {"device": "meta"}, "device 'meta' is not supported"),
        ("resnet20_cifar", {"input_size": 0}, "input_size must be at least 1 pixel, not 0"),
        ("resnet20_cifar", {"input_size": (3, 0, 4)}, r"input_size must be \(channels, height, width\)"),
        ("resnet20_cifar", {"lower_resolution": 16}, "name one with `against`"),
        (
            "resnet20_cifar",
            {"against": "resnet20_cifar", "lower_resolution": 32},
            "lower_resolution must be below the 32 px of resnet20_cifar, not 32",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(models: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(models, **options)  # type: ignore[arg-type]


def test_a_network_that_does_not_say_its_size() -> None:
    with pytest.raises(ValueError, match="Sequential does not say its input size"):
        measure(conv())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="device 'cuda' is not available"):
        measure("resnet20_cifar", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(engine: str, dtype: str) -> None:
    rows = measure(
        "resnet20_cifar_mod",
        against="resnet20_cifar",
        device="cuda",
        engine=engine,
        dtype=dtype,
        batch=4,
        channels_last=True,
        rounds=3,
        lower_resolution=16,
    )
    assert [r.error for r in rows] == [""] * 4
    assert all(r.median_ms is not None and r.median_ms > 0 for r in rows)
    assert {r.device for r in rows} == {"cuda"}
    assert rows[0].gpu == torch.cuda.get_device_name()
    assert rows[2].tax is not None
