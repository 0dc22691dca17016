"""Counts of CondConv against its paper's tables, in the paper's convention."""

from __future__ import annotations

import io
from decimal import Decimal

import pytest
import timm
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from pliant.counting import count_parameters, run_once
from pliant.methods.condconv import CondConvBlock
from pliant.methods.condconv.layers import CondConv2d, CondLinear, Router
from research.commands import app
from research.published import (
    CountRow,
    markdown,
    published_rows,
    render,
    reproduce_counts,
    tf_profiler_macs,
)

TABLES = ["1", "2", "3", "5", "6", "7", "8"]
IMAGENET = (3, 224, 224)

# All that the data file says of its rows beside "exact".
CONDITIONS = {
    ("2", "cc_mobilenetv2_050", "8 experts"): "exact with the last 11 blocks",
    ("2", "cc_mobilenetv2_100", "8 experts"): "exact with the last 11 blocks",
    ("3", "cc_resnet50", "2 experts"): "exact with the classifier replaced",
    ("3", "cc_resnet50", "8 experts"): "exact with a plain classifier",
}

# Parameters, and multiply-accumulates as the paper counts them.
INTEGERS = {
    ("1", "cc_mobilenetv1_050", "1 expert"): (1_334_802, 150_519_488),
    ("1", "cc_mobilenetv1_050", "32 experts"): (41_276_969, 190_461_376),
    ("1", "mobilenetv1_100", ""): (4_233_001, 568_916_992),
    ("2", "mobilenetv2_140", ""): (6_110_569, 582_543_360),
    ("2", "cc_mobilenetv2_100", "8 experts"): (27_461_009, 328_524_912),
    ("3", "resnet50", ""): (25_559_081, 4_093_049_856),
    ("5", "cc_mobilenetv1_025 depthwise+pointwise", "32 experts"): (14_602_009, 55_652_576),
    ("6", "cc_mobilenetv1_025 routing=hidden-large", "32 experts"): (16_781_593, 57_821_408),
}


@pytest.fixture(scope="module")
def report(counts_of):
    return counts_of("condconv")


def _key(row):
    return row.published.table, row.published.model, row.published.variant


def test_every_row_is_counted_but_those_of_detection(report):
    assert {_key(row) for row in report.rows} == {
        (p.table, p.model, p.variant) for p in published_rows("condconv", TABLES)
    }
    assert len(report.rows) == 38
    assert [(p.table, why) for p, why in report.left_out] == [
        ("4", "pliant has no detection networks yet")
    ] * 8


def test_counts_are_the_papers_at_printed_precision(report):
    for row in report.rows:
        assert row.parameters_m == row.published.params_m, (_key(row), row.parameters)
        assert row.printed_macs == row.published.macs, (_key(row), row.convention_macs)
        assert row.verdict == "match"


def test_what_the_file_says_of_rows_is_all_there_is_to_say(report):
    said = {_key(row): row.published.counts for row in report.rows if row.published.counts != "exact"}
    assert said == CONDITIONS


def test_rows_are_counted_as_the_file_says(report):
    options = {_key(row): row.options for row in report.rows}
    assert options["3", "cc_resnet50", "8 experts"] == {
        "num_classes": 1001,
        "experts": 8,
        "classifier": False,
    }
    assert "classifier" not in options["3", "cc_resnet50", "2 experts"]
    with torch.device("meta"):
        begun = timm.create_model("cc_mobilenetv2_100")
    assert sum(isinstance(m, CondConvBlock) for m in begun.modules()) == 11


@pytest.mark.parametrize(
    ("name", "options", "params_m", "macs_m"),
    [
        ("cc_mobilenetv2_050", {"begin": 13}, "15.06", "112.4"),
        ("cc_mobilenetv2_100", {"begin": 13}, "25.76", "326.5"),
        # One router a block, as the file counts; a router a convolution is in print the same.
        ("cc_resnet50", {}, "144.56", "4229.2"),
        ("cc_resnet50", {"routing": "layer"}, "144.60", "4229.5"),
    ],
)
def test_what_the_text_says_is_not_what_the_paper_counts(name, options, params_m, macs_m, report):
    with torch.device("meta"):
        model = timm.create_model(name, experts=8, num_classes=1001, **options)
    parameters, macs = count_parameters(model), tf_profiler_macs(model, IMAGENET)
    assert f"{parameters / 1e6:.2f}" == params_m
    assert f"{macs / 1e6:.1f}" == macs_m
    printed = next(r.published for r in report.rows if _key(r)[1:] == (name, "8 experts"))
    assert round(parameters / 1e6, 1) != float(printed.params_m)
    assert round(macs / 1e6) != int(printed.macs)


@pytest.mark.parametrize("routing", ["block", "layer"])
@pytest.mark.parametrize(
    ("experts", "classifier", "printed"), [(2, True, (42.6, 4127)), (8, False, (130.2, 4213))]
)
def test_resnet50_prints_the_same_with_a_router_a_block_or_a_convolution(
    routing, experts, classifier, printed
):
    with torch.device("meta"):
        model = timm.create_model(
            "cc_resnet50", routing=routing, experts=experts, classifier=classifier, num_classes=1001
        )
    parameters, macs = count_parameters(model), tf_profiler_macs(model, IMAGENET)
    assert (round(parameters / 1e6, 1), round(macs / 1e6)) == printed


def test_integers(report):
    ours = {_key(row): (row.parameters, row.convention_macs) for row in report.rows}
    assert {key: ours[key] for key in INTEGERS} == INTEGERS


def test_each_row_uses_its_convention(report):
    for row in report.rows:
        summed = "mobilenetv1" in row.network
        assert row.convention == ("TF profiler, summed" if summed else "TF profiler")
    # Neither way of mixing would do for all.
    with torch.device("meta"):
        v2 = timm.create_model("cc_mobilenetv2_100", experts=8, num_classes=1001)
        v1 = timm.create_model("cc_mobilenetv1_050", experts=8, num_classes=1001)
    assert round(tf_profiler_macs(v2, IMAGENET, mixing="sum") / 1e6) == 327  # prints 329
    assert round(tf_profiler_macs(v1, IMAGENET, mixing="product") / 1e6) == 160
    assert round(tf_profiler_macs(v1, IMAGENET, mixing="sum") / 1e6) == 160


def test_the_convention_by_hand():
    router = Router(16, experts=4, hidden=8)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        CondConv2d(16, 32, 3, padding=1, groups=4, bias="experts", experts=4, router=router),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        CondLinear(32, 10, "shared", experts=2, router=Router(32, 2)),
    )
    stem, pool = 16 * 8 * 8 * 27, 16 * 4 * 4 * 9 // 2
    routers = 16 * 4 * 4 // 2 + 16 * 8 + 8 * 4 + 32 * 2
    values, matrix = 32 * 4 * 9, 32 * 10
    layers = values * 4 * 4 + matrix
    others = 3 * 16 * 16 + stem + pool + routers + layers
    product = 4 * values + 2 * matrix
    assert tf_profiler_macs(network, (3, 16, 16)) == others + product
    assert tf_profiler_macs(network, (3, 16, 16), mixing="sum") == others + product - (values + matrix) // 2
    with pytest.raises(ValueError, match="mixing must be one of product, sum; not 'einsum'"):
        tf_profiler_macs(network, (3, 16, 16), mixing="einsum")


def test_the_last_pool_counts():
    pool = timm.layers.SelectAdaptivePool2d(pool_type="avg")
    assert tf_profiler_macs(pool, (3, 8, 8)) == 3 * 64 + 3 * 64 // 2


@pytest.mark.parametrize(
    ("name", "additions"),
    [
        # Output values of the blocks that add their input to their output.
        ("mobilenetv2_100", 24 * 56**2 + 32 * 2 * 28**2 + (64 * 3 + 96 * 2) * 14**2 + 160 * 2 * 7**2),
        ("resnet50", 256 * 3 * 56**2 + 512 * 4 * 28**2 + 1024 * 6 * 14**2 + 2048 * 3 * 7**2),
    ],
)
@pytest.mark.parametrize("options", [{}, {"layers": "pointwise"}, {"routing": "layer"}])
def test_blocks_add_also_when_their_convolutions_are_conditional(name, additions, options):
    with torch.device("meta"):
        plain = timm.create_model(name)
        conditional = timm.create_model(f"cc_{name}", **{"routing": "block"} | options)
    of = {}

    def note(module, args, output):
        of[module] = args[0].numel()

    for module in conditional.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note)
    more = tf_profiler_macs(conditional, IMAGENET) - tf_profiler_macs(plain, IMAGENET)
    layers = [m for m in conditional.modules() if isinstance(m, (CondConv2d, CondLinear))]
    mixing = sum(layer.weight.numel() for layer in layers)
    products = sum(router.fc2.weight.numel() for router in of)
    pools = sum(n for router, n in of.items() if n != router.fc2.in_features)
    assert more == mixing + products + pools // 2
    # And the plain network's additions are counted, once.
    bare = sum(
        m.weight[0].numel() * n for m, n in outputs(plain).items() if isinstance(m, (nn.Conv2d, nn.Linear))
    )
    rest = tf_profiler_macs(plain, IMAGENET) - bare - 3 * 224**2 - plain.num_features * 49 // 2
    rest -= 64 * 56**2 * 9 // 2 if name == "resnet50" else 0
    assert rest == additions // 2


def outputs(network):
    """Number of output values of each module, for one ImageNet image."""
    found = {}

    def note(module, _, y):
        found[module] = y.numel()

    for module in network.modules():
        module.register_forward_hook(note)
    run_once(network, IMAGENET)
    return found


@pytest.mark.parametrize("form", ["fused", "experts", "auto"])
def test_the_convention_does_not_depend_on_the_form(form):
    with torch.device("meta"):
        model = timm.create_model("cc_mobilenetv1_050", experts=8, num_classes=1001, form=form)
    assert tf_profiler_macs(model, IMAGENET, mixing="sum") == 159_538_624


def test_nothing_is_left_behind():
    model = timm.create_model("cc_mobilenetv1_025_cifar", experts=2).train()
    tf_profiler_macs(model, (3, 32, 32))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        tf_profiler_macs(model, (5, 32, 32))
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_tables_show_published_beside_ours(report):
    text = markdown(report)
    assert "| 1 | cc_mobilenetv1_050, 1 expert | 1.3 | 1.3 | 151 M | 151 M | 151 M | match |" in text
    assert "| 3 | resnet50 | 25.6 | 25.6 | 4093 M | 4093 M | 4089 M | match |" in text
    tables = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert tables[1:] == sorted(tables[1:])
    assert (
        "- cc_resnet50, 8 experts, imagenet (Table 3): match; the data file says: exact with a plain "
        "classifier; with the classifier replaced 144.56 and 4229.2"
    ) in text.splitlines()
    assert "left out, pliant has no detection networks yet: ssd300_mobilenetv1_025 (Table 4)" in text
    assert "ptflops" not in text
    console = Console(file=io.StringIO(), width=80)
    console.print(render(report))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "5 mobilenetv1_025 0.47 0.47 41.2 M 41.2 M 41.0 M match" in lines


def test_what_differs_would_be_seen(report):
    row = report.rows[0]
    other = CountRow(**{**vars(row), "convention_macs": row.convention_macs + 10**6})
    assert (other.printed_macs, other.verdict) == (Decimal(152), "MACs differ")
    other = CountRow(**{**vars(other), "parameters": 2 * row.parameters})
    assert (other.parameters_m, other.verdict) == (Decimal("2.7"), "parameters and MACs differ")


def test_command_line(monkeypatch, report):
    asked = []

    def reproduced(method, tables):
        asked.append((method, tables))
        return report

    monkeypatch.setattr("research.published.reproduce_counts", reproduced)

    def run(*options):
        return CliRunner().invoke(app, ["counts", *options])

    shown = run()
    assert asked == [("mod", None), ("condconv", None), ("adn", None)]
    assert "CondConv: counts published and ours" in shown.output
    assert "- TF profiler, summed: TensorFlow's profiler, halved" in shown.output
    assert run("--method", "condconv", "--table", "5", "--markdown").output == markdown(report) + "\n"
    assert asked[3:] == [("condconv", ["5"])]
    assert "--table needs the paper; add --method with one of mod, condconv, adn" in str(
        run("--table", "5").exception
    )


def test_bad_names():
    with pytest.raises(ValueError, match="no counts to reproduce for 'mdo'; there are some for mod, condc"):
        reproduce_counts("mdo")
    with pytest.raises(ValueError, match=r"condconv.csv holds no table '9'; it holds 1, 2, 3,"):
        reproduce_counts("condconv", ["9"])
