"""On how many published architectures channels can be cut, with no help per model.

    python benchmarks/coverage.py                       # all that is missing from the results
    python benchmarks/coverage.py --only 'timm:swin*'   # a part of the list, again
    python benchmarks/coverage.py --table               # only print

Each network, with random weights, loses half of the channels of every group, chosen at random, and runs.
It passes if the output has the shape that it had and the parameters fall below 0.8 of what they were. Then
a fresh copy loses half of the channels of all groups over which nothing takes a statistic; its output must
equal, within 1e-5, that of the whole network in which nothing reads those channels (float64, random batch
statistics). A network that passes both is covered. Every network runs in a process of its own; done rows
are kept in ``benchmarks/results/coverage.json``, so that it can be stopped and continued.

Images are as small as the network takes, from 64 pixels on: what is tied to what does not depend on it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lilliput.mechanisms.groups import Groups, find_groups
from lilliput.mechanisms.groups.skeleton import skeleton
from lilliput.mechanisms.surgery import cut
from lilliput.testing import stand_in_for_torchvision

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 299, 384)
KEEP, LIGHTER, TOLERANCE = 0.5, 0.8, 1e-5
SECONDS, BYTES = 600, 14 * 2**30  # of one network

CLASSIFICATION = """
alexnet vgg11 vgg13_bn vgg16 vgg19_bn squeezenet1_0 squeezenet1_1 resnet18 resnet34 resnet50
resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2 densenet121 densenet161
densenet169 densenet201 googlenet inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large
mnasnet0_5 mnasnet1_0 shufflenet_v2_x0_5 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_b3
efficientnet_v2_s regnet_x_400mf regnet_x_3_2gf regnet_y_400mf regnet_y_3_2gf convnext_tiny
convnext_small vit_b_16 vit_b_32 swin_t swin_s swin_v2_t swin_v2_s maxvit_t mnasnet1_3
shufflenet_v2_x2_0
"""
SEGMENTATION = (
    "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"
)
TIMM = """
beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_lite_tiny coat_tiny
coatnet_0_rw_224 convformer_s18 convit_tiny convmixer_768_32 convnext_atto convnextv2_atto
crossvit_9_240 crossvit_tiny_240 cs3darknet_focus_s cs3sedarknet_l cspdarknet53 cspresnet50
cspresnext50 darknet53 davit_tiny deit3_small_patch16_224 deit_tiny_distilled_patch16_224
deit_tiny_patch16_224 densenet121 dla34 dla46x_c dm_nfnet_f0 dpn48b dpn68 eca_botnext26ts_256
ecaresnet26t edgenext_small edgenext_xx_small efficientformer_l1 efficientformerv2_s0
efficientnet_b0 efficientnet_es efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw
eva02_tiny_patch14_224 fasternet_t0 fastvit_sa12 fastvit_t8 fbnetc_100 flexivit_small
focalnet_tiny_srf gcresnet33ts gcvit_xxtiny gernet_s ghostnet_050 ghostnetv2_100 gmixer_12_224
gmlp_ti16_224 halonet26t hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_next_atto
inception_resnet_v2 inception_v4 lambda_resnet26t lcnet_050 legacy_senet154 legacy_seresnet18
legacy_xception levit_128s mambaout_femto maxvit_tiny_rw_224 maxxvit_rmlp_nano_rw_256 mixer_s32_224
mixnet_m mixnet_s mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium
mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nasnetalarge nest_tiny nextvit_small
nf_regnet_b0 nf_resnet26 pit_ti_224 pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b0
pvt_v2_b2_li rdnet_tiny regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvgg_a0 repvit_m1
res2net101_26w_4s res2net50_14w_8s res2next50 resmlp_12_224 resnest14d resnest26d resnet26t
resnetaa50 resnetblur50 resnetrs50 resnetv2_18 resnetv2_50x1_bit rexnet_100 selecsls42 semnasnet_075
sequencer2d_s seresnet33ts seresnext26t_32x4d shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100
starnet_s050 swiftformer_xs swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 tf_efficientnetv2_b0 tf_mixnet_s tiny_vit_5m_224 tinynet_e
tnt_s_legacy_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small visformer_tiny
vit_relpos_small_patch16_224 vit_small_patch32_224 vit_tiny_r_s16_p8_224 vitamin_small_224
volo_d1_224 wide_resnet50_2 xception41 xception41p xcit_nano_12_p16_224 xcit_tiny_12_p8_224
"""

Row = dict[str, Any]


# -- the list -----------------------------------------------------------------------------------


def names() -> Iterator[str]:
    """``library:architecture`` of everything on the list."""
    for library, listed in (
        ("torchvision", CLASSIFICATION),
        ("segmentation", SEGMENTATION),
        ("timm", TIMM),
    ):
        yield from dict.fromkeys(f"{library}:{name}" for name in listed.split())


def build(name: str) -> nn.Module:
    """A network with random weights."""
    library, _, architecture = name.partition(":")
    stand_in_for_torchvision()
    if library == "timm":
        import timm

        return timm.create_model(architecture, pretrained=False)
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if library == "segmentation":
        options["weights_backbone"] = None
    if architecture in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # theirs takes a minute
    return torchvision.models.get_model(architecture, **options)


# -- one network --------------------------------------------------------------------------------


def judge(name: str) -> Row:
    """Cut one network twice, and say how it went."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    row: Row = {"name": name, "passed": False, "reason": ""}
    try:
        model = build(name).eval()
        x = smallest_example(model)
        row["input"] = list(x.shape)
        half_of_everything(build_again(model), x, row)
        half_of_what_compares(model.double(), x.double(), row)
        row["reason"] = verdict(row)
        row["passed"] = not row["reason"]
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {str(error)[:300]}"
    return row


def build_again(model: nn.Module) -> nn.Module:
    """A copy to cut; the other cut needs the whole network."""
    import copy

    return copy.deepcopy(model)


def half_of_everything(model: nn.Module, x: Tensor, row: Row) -> None:
    shapes = run(model, x)
    row["parameters"] = parameters(model)
    row["macs"] = macs(model, x)
    begin = time.process_time()
    groups = find_groups(model, x)
    row["find_seconds"] = round(time.process_time() - begin, 3)
    row["groups"] = len(groups.groups)
    row["mixed_groups"] = sum(bool(g.mixed_by) for g in groups.groups)
    row["unprunable"] = len(groups.unprunable)
    begin = time.process_time()
    cut(model, groups, random_half(groups))
    row["cut_seconds"] = round(time.process_time() - begin, 3)
    row["parameters_after"] = parameters(model)
    row["macs_after"] = macs(model, x)
    row["same_shapes"] = run(model, x) == shapes


def half_of_what_compares(model: nn.Module, x: Tensor, row: Row) -> None:
    randomize(model)
    groups = find_groups(model, x)
    comparable = random_half(groups, only=lambda g: not g.mixed_by)
    row["compared_groups"] = len(comparable)
    row["error"] = cut(model, groups, comparable, inputs=x, tolerance=float("inf")).error


def verdict(row: Row) -> str:
    """Why a network is not covered; empty where it is."""
    if not row["same_shapes"]:
        return "the output has another shape"
    if row["parameters_after"] >= LIGHTER * row["parameters"]:
        return f"keeps {row['parameters_after'] / row['parameters']:.0%} of its parameters"
    if row["error"] is not None and not row["error"] <= TOLERANCE:
        return f"differs by {row['error']:.1e} from the network with silenced channels"
    return ""


def random_half(
    groups: Groups, only: Callable[[Any], bool] = lambda group: True
) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        number: np.sort(generator.permutation(group.channels)[: group.channels - kept])
        for number, group in enumerate(groups.groups)
        if only(group) and (kept := max(1, round(group.channels * KEEP))) < group.channels
    }


def smallest_example(model: nn.Module) -> Tensor:
    """The smallest image on which the network runs, found on the meta device."""
    bare = skeleton(model)
    own = getattr(model, "default_cfg", None) or {}
    last = tuple(own.get("input_size") or (3, 224, 224))
    for shape in (*((3, s, s) for s in SIZES), last):
        try:
            with torch.no_grad():
                bare(torch.empty(2, *shape, device="meta"))
        except Exception:
            continue
        return torch.randn(1, *shape)
    return torch.randn(1, *last)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in pytree.tree_leaves(model(x)) if isinstance(t, Tensor)]


@torch.no_grad()
def macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        skeleton(model).requires_grad_(False)(x.to("meta"))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Batch statistics and vectors as training leaves them: no zero, no one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    for tensor in model.parameters():
        if tensor.dim() == 1:
            tensor.add_(torch.randn_like(tensor) / 10)


# -- all of them --------------------------------------------------------------------------------


def judge_apart(name: str) -> Row:
    """The same in a process of its own, which may crash or hang."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, preexec_fn=limit_memory
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "passed": False, "reason": f"took more than {SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"name": name, "passed": False, "reason": f"crashed: {done.stderr.strip()[-300:]}"}
    row: Row = json.loads(lines[-1])
    return row


def limit_memory() -> None:
    """No entry may take the machine's memory from the others."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def load() -> dict[str, Row]:
    return (
        {r["name"]: r for r in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    )


def save(rows: dict[str, Row]) -> None:
    packages = ("torch", "torchvision", "timm", "numpy")
    content = {
        "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
        "keep": KEEP,
        "rows": [rows[name] for name in names() if name in rows],
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def print_table(rows: dict[str, Row]) -> None:
    print(f"{'network':48s} {'':4s} {'params':>7s} {'MACs':>6s} {'error':>8s} {'find':>6s}  reason")
    for row in rows.values():
        print(describe(row))
    for library in ("torchvision", "segmentation", "timm"):
        mine = [r for n, r in rows.items() if n.startswith(library)]
        print(f"{library}: {sum(r['passed'] for r in mine)} of {len(mine)} covered")


def describe(row: Row) -> str:
    mark = "ok" if row["passed"] else "FAIL"
    if "macs_after" not in row:
        return f"{row['name']:48s} {mark:4s} {row['reason']}"
    error = "" if row.get("error") is None else f"{row['error']:.1e}"
    return (
        f"{row['name']:48s} {mark:4s} {row['parameters_after'] / row['parameters']:7.3f} "
        f"{row['macs_after'] / row['macs']:6.3f} {error:>8s} {row['find_seconds']:6.2f}  {row['reason']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a pattern of names; these are run again")
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(judge(options.one)))
        return
    rows = load()
    wanted = [n for n in names() if fnmatch.fnmatch(n, options.only or "*")]
    for name in [] if options.table else wanted:
        if options.only or name not in rows:
            rows = load() | {name: judge_apart(name)}
            save(rows)
            print(describe(rows[name]), flush=True)
    print_table({name: rows[name] for name in wanted if name in rows})


if __name__ == "__main__":
    main()
