"""Methods against their equations, written out here image by image; and identities that hold between methods.

T1 to T14 are the properties that the methods must have. Elsewhere: T9 (Sinkhorn) in test_ops, T10 (queue) in
test_heads, T11 (learning rates) in test_optim, T13 (votes of neighbours) in test_evaluate.

Values and gradients are compared. Target networks are moved away from the networks that they follow, so that no test
passes with the wrong one.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import made
from torch import Tensor, nn

from fastssl.losses import guided as addons
from fastssl.losses.ops import combine, divide, feature_std, info_nce, mean_of_others, negative_cosine, others, subsets
from fastssl.progress import Progress
from loaders import Batch

Equation = Callable[[nn.Module, list[Tensor]], Tensor]
PAIR_METHODS = ("simsiam", "byol", "mocov3", "nnclr")


def ready(name: str, B: int = 6, **options: object) -> tuple[nn.Module, Batch]:
    """A method whose targets are not what they follow, and a batch for it."""
    _, method, batch = made(name, B, **options)
    with torch.no_grad():
        for n, p in method.named_parameters():
            if n.startswith("target_"):
                p.add_(0.1 * torch.randn_like(p))
    return method, batch


def gradients(method: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    method.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in method.named_parameters()}


def step(method: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a batch; the method itself is left as it was."""
    method = copy.deepcopy(method)
    loss, _ = method(batch)
    return loss.detach(), gradients(method, loss)


def assert_same(found: tuple[Tensor, dict], expected: tuple[Tensor, dict], rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=rtol)
    assert found[1].keys() == expected[1].keys()
    assert max(grad.norm() for grad in expected[1].values()) > 1e-3
    for name, grad in expected[1].items():
        # Biases in front of a BatchNorm have no gradient but what rounding leaves of one.
        assert (found[1][name] - grad).norm() < 1e-3 * grad.norm() + 1e-6, name


def scaled(by: float, *steps: tuple[Tensor, dict]) -> tuple[Tensor, dict]:
    """The sum of losses and gradients, times a number."""
    names = steps[0][1]
    return by * sum(loss for loss, _ in steps), {n: by * sum(grads[n] for _, grads in steps) for n in names}


def assert_is(method: nn.Module, batch: Batch, equation: Equation) -> None:
    other = copy.deepcopy(method)
    loss = equation(other, batch.views)
    assert_same(step(method, batch), (loss.detach(), gradients(other, loss)))


# ------------------------------------------------------------------ the papers' distances, one image at a time


def cosine(a_D: Tensor, b_D: Tensor) -> Tensor:
    return (a_D * b_D).sum() / ((a_D**2).sum().sqrt() * (b_D**2).sum().sqrt())


def D(p_BD: Tensor, z_BD: Tensor) -> Tensor:
    return torch.stack([-cosine(p, z.detach()) for p, z in zip(p_BD, z_BD, strict=True)]).mean()


def CE(q_BD: Tensor, k_BD: Tensor, temperature: float) -> Tensor:
    """Row b looks for key b among all of them."""
    terms = []
    for b, q in enumerate(q_BD):
        e = [torch.exp(cosine(q, k) / temperature) for k in k_BD]
        terms.append(-torch.log(e[b] / sum(e)))
    return sum(terms) / len(terms)


def mean(terms: list[Tensor]) -> Tensor:
    return sum(terms) / len(terms)


def online(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    z = m.projector(m.backbone(x))
    return z, m.predictor(z)


@torch.no_grad()
def target(m: nn.Module, x: Tensor) -> Tensor:
    return m.target_projector(m.target_backbone(x))


# ------------------------------------------------------------------ equations: pairs of views


def simsiam(m: nn.Module, views: list[Tensor]) -> Tensor:
    (z1, p1), (z2, p2) = (online(m, x) for x in views)
    return D(p1, z2) / 2 + D(p2, z1) / 2


def fastsiam(m: nn.Module, views: list[Tensor]) -> Tensor:
    z, p = zip(*(online(m, x) for x in views), strict=True)
    V = len(views)
    return sum(D(p[i], sum(z[j] for j in range(V) if j != i) / (V - 1)) for i in range(V)) / V


def byol(m: nn.Module, views: list[Tensor]) -> Tensor:
    (_, p1), (_, p2) = (online(m, x) for x in views)
    t1, t2 = (target(m, x) for x in views)
    return (2 + 2 * D(p1, t2)) + (2 + 2 * D(p2, t1))


def guided_codes_byol(m: nn.Module, views: list[Tensor]) -> Tensor:
    """BYOL in the official code of guided stop-gradient, without its guide."""
    (_, p1), (_, p2) = (online(m, x) for x in views)
    return D(p1, target(m, views[1])) / 2 + D(p2, target(m, views[0])) / 2


def moco_v3(m: nn.Module, views: list[Tensor]) -> Tensor:
    T = m.config.temperature
    (_, q1), (_, q2) = (online(m, x) for x in views)
    return 2 * T * CE(q1, target(m, views[1]), T) + 2 * T * CE(q2, target(m, views[0]), T)


def nearest(m: nn.Module, z_BD: Tensor) -> Tensor:
    rows = m.queue.rows.clone()
    return torch.stack([max(rows, key=lambda row, z=z: cosine(row, z).item()) for z in z_BD])


def nnclr(m: nn.Module, views: list[Tensor]) -> Tensor:
    T = m.config.temperature
    (z1, p1), (z2, p2) = (online(m, x) for x in views)
    return CE(nearest(m, z1), p2, T) / 2 + CE(nearest(m, z2), p1, T) / 2


@pytest.mark.parametrize(
    ("name", "options", "equation"),
    [
        ("simsiam", {}, simsiam),
        ("fastsiam", {"num_views": 4}, fastsiam),
        ("byol", {}, byol),
        ("byol", {"sum_directions": False}, guided_codes_byol),
        ("mocov3", {"temperature": 1.0}, moco_v3),
        ("mocov3", {"temperature": 0.2}, moco_v3),
        ("nnclr", {"temperature": 0.1}, nnclr),
    ],
)
def test_methods_of_pairs_are_their_equations(name: str, options: dict, equation: Equation) -> None:
    assert_is(*ready(name, **options), equation)


def test_nnclr_takes_in_the_first_views_projections_after_the_look_up() -> None:
    method, batch = ready("nnclr")
    before, z1 = method.queue.rows.clone(), online(copy.deepcopy(method), batch.views[0])[0]
    method(batch)
    torch.testing.assert_close(method.queue.rows[:6], F.normalize(z1, dim=1))
    assert torch.equal(method.queue.rows[6:], before[6:])


# ------------------------------------------------------------------ equations: a queue of keys


def moco_v2(m: nn.Module, views: list[Tensor], symmetric: bool = False) -> Tensor:
    """Every query against every key of another large view, each pair of views alike."""
    T, queue = m.config.temperature, m.queue.rows.clone()
    small = m.backbone(torch.cat(views[2:])).chunk(len(views) - 2) if views[2:] else ()
    queries = [m.projector(h) for h in (m.backbone(views[0]), m.backbone(views[1]), *small)]
    terms = []
    for j in range(2 if symmetric else 1):
        keys = target(m, views[j])
        for i, q_BD in enumerate(queries):
            if i == j or (i == 0 and not symmetric):
                continue
            for q, k in zip(q_BD, keys, strict=True):
                positive = torch.exp(cosine(q, k) / T)
                terms.append(-torch.log(positive / (positive + sum(torch.exp(cosine(q, n) / T) for n in queue))))
    return mean(terms)


@pytest.mark.parametrize("num_local", [0, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_v2_is_its_equation(num_local: int, symmetric: bool) -> None:
    method, batch = ready("mocov2", 4, size=64, num_local=num_local, symmetric=symmetric, queue_size=16)
    method.queue.push(F.normalize(torch.randn(5, 32), dim=1))  # the next place is in the middle
    assert_is(method, batch, lambda m, views: moco_v2(m, views, symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_v2_remembers_its_keys_after_the_look_up(symmetric: bool) -> None:  # T10
    method, batch = ready("mocov2", 4, symmetric=symmetric)
    keys = torch.cat([target(method, x) for x in batch.views[: 1 + symmetric]])
    before = method.queue.rows.clone()
    method(batch)
    torch.testing.assert_close(method.queue.rows[: len(keys)], F.normalize(keys, dim=1))
    assert torch.equal(method.queue.rows[len(keys) :], before[len(keys) :])
    assert not method.queue.rows.requires_grad


# ------------------------------------------------------------------ equations: prototypes


def balanced(scores_NP: Tensor, epsilon: float, rounds: int = 3) -> Tensor:
    """SwAV's listing: prototypes in rows, all normalised to a sum of one."""
    Q_PN = torch.exp(scores_NP.detach() / epsilon).T
    P, N = Q_PN.shape
    Q_PN = Q_PN / Q_PN.sum()
    for _ in range(rounds):
        Q_PN = Q_PN / Q_PN.sum(1, keepdim=True) / P
        Q_PN = Q_PN / Q_PN.sum(0, keepdim=True) / N
    return (Q_PN * N).T


def by_size(net: nn.Module, views: list[Tensor]) -> Tensor:
    """The large views through the network together, then the small ones together; all rows."""
    return torch.cat([net(torch.cat(same)) for same in (views[:2], views[2:]) if same])


def swav(m: nn.Module, views: list[Tensor], old: list[Tensor] | None = None) -> Tensor:
    C_PD = F.normalize(m.prototypes.weight, dim=1)
    with torch.no_grad():
        m.prototypes.weight.copy_(C_PD)
    C_PD = m.prototypes.weight  # the gradient is that of the unit rows
    z = [F.normalize(z, dim=1) for z in m.projector(by_size(m.backbone, views)).chunk(len(views))]
    terms = []
    for i in range(2):
        rows = z[i] if old is None else torch.cat([old[i], z[i]])
        codes = balanced(rows @ C_PD.T, m.config.epsilon)[-len(z[i]) :]
        for v in range(len(views)):
            if v != i:
                for q_P, z_D in zip(codes, z[v], strict=True):
                    e_P = torch.exp(C_PD @ z_D / m.config.temperature)
                    terms.append(-sum(q * torch.log(e / e_P.sum()) for q, e in zip(q_P, e_P, strict=True)))
    return mean(terms)


@pytest.mark.parametrize("num_local", [0, 2])
def test_swav_is_its_equation(num_local: int) -> None:
    method, batch = ready("swav", 4, size=64, num_local=num_local, prototypes=8)
    with torch.no_grad():
        method.prototypes.weight.mul_(3)  # lengths must not matter
    assert_is(method, batch, swav)


def test_swav_with_a_queue_is_its_equation() -> None:
    """The queue fills from its epoch on, serves when it is full, and codes are those of the batch alone before."""
    method, batch = ready("swav", 4, prototypes=8, queue_size=8, queue_from_epoch=2)
    for number in range(14):
        method.before_step(Progress(number, 30, 5))
        full = number >= 10 + 2  # two steps of 4 rows fill it
        old = [queue.rows.clone() for queue in method.queues] if full else None
        views = [torch.randn_like(x) for x in batch.views]
        with torch.no_grad():
            expected = swav(copy.deepcopy(method), views, old)
            before = [queue.rows.clone() for queue in method.queues]
            z = F.normalize(method.projector(method.backbone(torch.cat(views))), dim=1).chunk(2)
            loss, _ = method(dataclasses.replace(batch, views=views))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=number: f"step {n}: {m}")
        for i, queue in enumerate(method.queues):
            place = 4 * (number % 2)
            changed = queue.rows[place : place + 4]
            torch.testing.assert_close(changed, z[i] if number >= 10 else before[i][place : place + 4])


def dino(m: nn.Module, views: list[Tensor]) -> Tensor:
    c = m.config

    def logits(prefix: str, xs: list[Tensor]) -> Tensor:
        net, g, last = (getattr(m, prefix + n) for n in ("backbone", "projector", "prototypes"))
        z = g(by_size(net, xs))
        rows = last.weight / last.weight.norm(dim=1, keepdim=True)
        return (z / z.norm(dim=1, keepdim=True) @ rows.T).chunk(len(xs))

    student = logits("", views)
    with torch.no_grad():
        teacher = logits("target_", views[:2])
    terms = []
    for g in range(2):
        for v in range(len(views)):
            if v != g:
                for s_P, t_P in zip(student[v], teacher[g], strict=True):
                    e_t = torch.exp((t_P - m.center) / m.teacher_temperature)
                    e_s = torch.exp(s_P / c.student_temperature)
                    terms.append(-(e_t / e_t.sum() * torch.log(e_s / e_s.sum())).sum())
    return mean(terms)


@pytest.mark.parametrize("num_local", [0, 2])
def test_dino_is_its_equation(num_local: int) -> None:
    method, batch = ready("dino", 4, size=64, num_local=num_local, teacher_temperature=0.07)
    method.center.copy_(0.1 * torch.randn(32))
    assert_is(method, batch, dino)


# ------------------------------------------------------------------ equations: combinatorial patches


def combinations(m: nn.Module, x: Tensor) -> list[Tensor]:
    """p of the six pairs of 2 x 2 tiles: features averaged, then heads on all 6 B rows together."""
    s = x.shape[-1] // 2
    top, bottom = x[:, :, :s], x[:, :, s:]
    tiles = [top[..., :s], bottom[..., :s], top[..., s:], bottom[..., s:]]
    h = m.backbone(torch.cat(tiles).contiguous(memory_format=torch.channels_last)).chunk(4)
    pairs = [(h[a] + h[b]) / 2 for a, b in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]]
    return list(m.predictor(m.projector(torch.cat(pairs))).chunk(6))


def patched(distance: Callable[[nn.Module, Tensor, Tensor], Tensor], targets: Callable) -> Equation:
    """The mean of a distance over the 12 pairs of a combination and the whole other view."""

    def equation(m: nn.Module, views: list[Tensor]) -> Tensor:
        t = [targets(m, x) for x in views]
        return mean([distance(m, p, t[1 - i]) for i in range(2) for p in combinations(m, views[i])])

    return equation


@torch.no_grad()
def shared(m: nn.Module, x: Tensor) -> Tensor:
    return m.projector(m.backbone(x))


@pytest.mark.parametrize(
    ("name", "options", "equation"),
    [
        ("fastmoco", {}, patched(lambda _, p, t: CE(p, t, 1.0), target)),
        ("fastmoco", {"temperature": 0.3}, patched(lambda _, p, t: CE(p, t, 0.3), target)),
        ("simsiam", {}, patched(lambda _, p, t: D(p, t), shared)),
        ("byol", {}, patched(lambda _, p, t: 4 + 4 * D(p, t), target)),
        ("nnclr", {}, patched(lambda m, p, t: CE(nearest(m, t), p, m.config.temperature), shared)),
    ],
)
def test_combinatorial_patches_are_their_equation(name: str, options: dict, equation: Equation) -> None:
    assert_is(*ready(name, 5, size=64, patches="divide-encode-combine", **options), equation)


def test_fastsiam_with_patches_predicts_the_mean_of_the_others() -> None:
    method, batch = ready("fastsiam", 5, size=64, num_views=3, patches="divide-encode-combine")

    def equation(m: nn.Module, views: list[Tensor]) -> Tensor:
        z = [shared(m, x) for x in views]
        t = [(z[1] + z[2]) / 2, (z[0] + z[2]) / 2, (z[0] + z[1]) / 2]
        return mean([D(p, t[i]) for i in range(3) for p in combinations(m, views[i])])

    assert_is(method, batch, equation)


def test_extra_crops_predict_both_targets_and_the_same_view_may_be_the_target() -> None:
    """Two ablations of Fast-MoCo: 6 + 6 combinations and a whole crop against both targets; each view its own."""
    method, batch = ready("fastmoco", 4, size=64, extra_crops=1)

    def more(m: nn.Module, views: list[Tensor]) -> Tensor:
        t = [target(m, x) for x in views[:2]]
        terms = [CE(p, t[1 - i], 1.0) for i in range(2) for p in combinations(m, views[i])]
        return mean(terms + [CE(online(m, views[2])[1], k, 1.0) for k in t])

    assert_is(method, batch, more)
    method, batch = ready("fastmoco", 4, size=64, target_view="same")

    def same(m: nn.Module, views: list[Tensor]) -> Tensor:
        return mean([CE(p, target(m, x), 1.0) for x in views for p in combinations(m, x)])

    assert_is(method, batch, same)


# ------------------------------------------------------------------ equations: guided stop-gradient


@pytest.fixture
def partner(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """r(i) of the next batch of 6 images: with a fixed point, and not its own inverse."""
    order = [2, 0, 1, 3, 5, 4]
    monkeypatch.setattr(addons, "draw_partners", lambda num, _fixed, _device: torch.tensor(order[:num]))
    return order


def guided(m: nn.Module, views: list[Tensor], partner: list[int], place: Callable[[int], int], momentum: bool):
    """Views 0, 1 are x11, x12 of image 1 = b and views 2, 3 are x21, x22 of image 2 = r(b)."""
    z, p = zip(*(online(m, x) for x in views), strict=True)
    t = [target(m, x) for x in views] if momentum else z
    rows = []
    for b, r in enumerate(partner):
        d = [(t[i][b] - t[j][r]).norm().item() for i in (0, 1) for j in (2, 3)]
        a, c = divmod(place(d.index(min(d))), 2)
        one = -cosine(p[a][b], t[1 - a][b].detach())
        two = -cosine(p[2 + c][r], t[3 - c][r].detach())
        rows.append(one / 2 + two / 2)
    return mean(rows)


@pytest.mark.parametrize("mode", ["guided", "reversed"])
@pytest.mark.parametrize("name", ["simsiam", "byol"])
def test_guided_stop_gradient_is_its_equation(name: str, mode: str, partner: list[int]) -> None:
    options = {"sum_directions": False} if name == "byol" else {}
    method, batch = ready(name, guided=mode, **options)

    def place(k: int) -> int:
        return k if mode == "guided" else 3 - k

    assert_is(method, batch, lambda m, views: guided(m, views, partner, place, momentum=name == "byol"))


# ------------------------------------------------------------------ T1, T2


def test_t1_fastsiam_with_two_views_is_simsiam_bit_for_bit() -> None:
    simsiam_loss, simsiam_grads = step(*ready("simsiam"))
    loss, grads = step(*ready("fastsiam", num_views=2))
    assert torch.equal(loss, simsiam_loss)
    assert grads.keys() == simsiam_grads.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, simsiam_grads[name]), name
    assert any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("V", [2, 3, 4])
def test_t1_raw_and_normalised_means_agree_for_two_views_or_equal_norms(V: int) -> None:
    p = torch.randn(V, 16, 8, dtype=torch.float64, requires_grad=True)
    z = torch.randn(V, 16, 8, dtype=torch.float64) * torch.rand(V, 16, 1, dtype=torch.float64).mul(4)

    def loss(z_KBD: Tensor) -> tuple[Tensor, Tensor]:
        value = negative_cosine(p, mean_of_others(z_KBD)).mean()
        return value.detach(), torch.autograd.grad(value, p)[0]

    raw, unit = loss(z), loss(F.normalize(z, dim=-1))
    assert ((raw[0] - unit[0]).abs() < 1e-12) == (V == 2)
    assert ((raw[1] - unit[1]).abs().max() < 1e-12) == (V == 2)
    equal = loss(5 * F.normalize(z, dim=-1))
    torch.testing.assert_close(equal, unit)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_t2_fast_moco_of_one_tile_is_moco_v3_less_its_factor(temperature: float) -> None:
    one = step(*ready("fastmoco", divide=1, combine=1, temperature=temperature))
    baseline = step(*ready("fastmoco", patches="off", temperature=temperature))
    assert_same(one, baseline, rtol=1e-6)
    heads = {
        "projector_layers": 3,
        "projector_bias": "all",
        "projector_norm": "affine",
        "predictor_bias": "all",
    }
    official = step(*ready("mocov3", temperature=temperature, **heads))
    assert_same(official, scaled(4 * temperature, one))


# ------------------------------------------------------------------ T3, T4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_t3_all_tiles_together_are_one_combination(n: int) -> None:
    h = torch.randn(n * n, 5, 7)
    whole = combine(h, n * n)
    assert whole.shape == (1, 5, 7)
    torch.testing.assert_close(whole[0], h.mean(0))


def test_t3_fast_moco_of_all_tiles_predicts_once_per_view() -> None:
    def equation(m: nn.Module, views: list[Tensor]) -> Tensor:
        terms = []
        for i, x in enumerate(views):
            h = m.backbone(divide(x, 2)).chunk(4)
            terms.append(CE(m.predictor(m.projector(sum(h) / 4)), target(m, views[1 - i]), 1.0))
        return mean(terms)

    assert_is(*ready("fastmoco", size=64, combine=4), equation)


@pytest.mark.parametrize(("n", "m"), [(2, 1), (2, 2), (2, 3), (3, 2), (3, 4)])
def test_t3_every_tile_is_in_equally_many_combinations(n: int, m: int) -> None:
    chosen = subsets(n * n, m)
    assert len(chosen) == len(set(chosen)) == math.comb(n * n, m)
    for tile in range(n * n):
        assert sum(tile in c for c in chosen) == math.comb(n * n - 1, m - 1)
    h = torch.randn(n * n, 4, 6, dtype=torch.float64)
    swapped = combine(h[torch.randperm(n * n)], m)
    rows = {tuple(row) for row in combine(h, m).flatten(1).mul(1e6).round().tolist()}
    assert rows == {tuple(row) for row in swapped.flatten(1).mul(1e6).round().tolist()}


@pytest.mark.parametrize("m", [2, 3])
def test_t3_swapping_tiles_does_not_change_the_loss(m: int) -> None:
    method, batch = ready("fastmoco", size=64, combine=m)
    tiles = [divide(x, 2) for x in batch.views]
    order = torch.tensor([2, 0, 3, 1])
    swapped = [t.unflatten(0, (4, -1))[order].flatten(0, 1) for t in tiles]
    assert_same(
        step(method, dataclasses.replace(batch, tiles=swapped)), step(method, dataclasses.replace(batch, tiles=tiles))
    )


def test_t4_twelve_terms_six_blocks_of_rows_and_whole_targets() -> None:
    method, batch = ready("fastmoco", 2, size=224)
    seen: dict[str, list[torch.Size]] = {}
    for name in ("backbone", "predictor", "target_backbone"):
        getattr(method, name).register_forward_hook(
            lambda _m, inputs, _o, name=name: seen.setdefault(name, []).append(inputs[0].shape)
        )
    method(batch)
    assert seen["backbone"] == [(4 * 2, 3, 112, 112)] * 2
    assert seen["predictor"] == [(6 * 2, 32)] * 2
    assert seen["target_backbone"] == [(2, 3, 224, 224)] * 2
    weights = others([0] * 6 + [1] * 6, 2)
    assert sorted(itertools.chain(*weights)) == [0.0] * 12 + [1 / 12] * 12
    assert all(row[0] == 0 for row in weights[:6]) and all(row[1] == 0 for row in weights[6:])


@pytest.mark.parametrize("name", ["fastmoco", "fastsiam", *PAIR_METHODS])
def test_t4_no_gradient_flows_into_the_target(name: str) -> None:
    """Tiles are given apart from the views: the views then serve for targets alone."""
    method, batch = ready(name, size=64, patches="divide-encode-combine")
    views = [x.clone().requires_grad_() for x in batch.views]
    tiles = [divide(x, 2).requires_grad_() for x in batch.views]
    method(dataclasses.replace(batch, views=views, tiles=tiles))[0].backward()
    assert all(x.grad is None for x in views)
    assert all(x.grad.abs().sum() > 0 for x in tiles)
    assert all(p.grad is None for n, p in method.named_parameters() if n.startswith("target_"))


def test_t4_the_order_of_combinations_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = ready("fastmoco", size=64)
    before, order = step(method, batch), torch.randperm(12)
    predict, owners = method.steps.predict, method.steps.owners
    monkeypatch.setattr(method.steps, "predict", lambda q, z: predict(q, z)[order])
    monkeypatch.setattr(method.steps, "owners", lambda z: [owners(z)[i] for i in order])
    assert_same(step(method, batch), before)


# ------------------------------------------------------------------ T5, T6


def symmetric(method: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
    """Mean of the method's plain losses of views 0, 1 and of views 2, 3."""
    method = copy.deepcopy(method)
    method.config = method.steps.config = dataclasses.replace(method.config, guided="off")
    pairs = [dataclasses.replace(batch, views=batch.views[i : i + 2]) for i in range(0, len(batch.views), 2)]
    return scaled(1 / len(pairs), *[step(method, pair) for pair in pairs])


def with_mode(method: nn.Module, mode: str) -> nn.Module:
    method = copy.deepcopy(method)
    method.config = method.steps.config = dataclasses.replace(method.config, guided=mode)
    return method


@pytest.mark.parametrize("num_views", [2, 4])
@pytest.mark.parametrize("name", PAIR_METHODS)
def test_t5_guided_and_reversed_are_twice_the_symmetric_loss(name: str, num_views: int) -> None:
    method, batch = ready(name, guided="guided", guided_views=num_views)
    steps = []
    for mode in ("guided", "reversed"):
        torch.manual_seed(3)  # the same partners
        steps.append(step(with_mode(method, mode), batch))
    assert_same(scaled(1, *steps), scaled(2, symmetric(method, batch)))
    assert (steps[0][0] - steps[1][0]).abs() > 1e-4


@pytest.mark.parametrize("name", PAIR_METHODS)
def test_t5_the_mean_of_the_four_selections_is_the_symmetric_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = ready(name, guided="guided")
    steps = []
    for a, b in itertools.product((0, 1), repeat=2):
        selection = torch.full((6,), a), torch.full((6,), b)
        monkeypatch.setattr(addons, "closest_views", lambda *_, selection=selection: selection)
        steps.append(step(method, batch))
    assert_same(scaled(1 / 4, *steps), symmetric(method, batch))


@pytest.mark.parametrize("num_views", [2, 4])
def test_t6_without_predictor_the_value_is_simsiams_but_not_the_gradient(num_views: int) -> None:
    method, batch = ready("simsiam", guided="guided", guided_views=num_views, predictor=False)
    (loss, grads), (expected, other) = step(method, batch), symmetric(method, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    conv = "backbone.conv1.weight"
    assert (grads[conv] - other[conv]).norm() > 0.1 * other[conv].norm()


@pytest.mark.parametrize("num_views", [2, 4])
def test_t6_an_image_paired_with_its_own_two_views_has_one_direction(
    num_views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All four distances between x1, x2 and themselves: the first zero wins, and x1 predicts x2."""
    monkeypatch.setattr(addons, "draw_partners", lambda num, _fixed, _device: torch.arange(num))
    method, batch = ready("simsiam", guided="guided", guided_views=num_views)
    x1, x2 = batch.views[:2]
    batch = dataclasses.replace(batch, views=[x1, x2] * (num_views // 2))

    def one_direction(m: nn.Module, _views: list[Tensor]) -> Tensor:
        return D(online(m, x1)[1], online(m, x2)[0])

    assert_is(method, batch, one_direction)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), K=st.integers(2, 4), scale=st.floats(0.01, 100), shift=st.floats(-20, 20))
def test_t6_the_selection_ignores_rotation_shift_and_scale_of_all(
    seed: int, K: int, scale: float, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, other = torch.randn(2, K, 8, 5, generator=generator)
    d = torch.cdist(z.transpose(0, 1), other.transpose(0, 1)).flatten(1).sort(dim=1).values
    assume((d[:, 1] - d[:, 0]).min() > 1e-3)  # nearer to a tie, rounding decides
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator))
    moved = [scale * (x @ turn + shift * torch.ones(5)) for x in (z, other)]
    for found, expected in zip(addons.closest_views(*moved), addons.closest_views(z, other), strict=True):
        assert torch.equal(found, expected)


def test_t6_the_selection_depends_on_the_lengths_of_single_rows() -> None:
    z, other = torch.randn(2, 2, 64, 5)
    lengths = torch.rand(2, 64, 1) * 5
    picks = [addons.closest_views(*pair) for pair in ((z, other), (z * lengths, other * lengths.flip(0)))]
    assert not torch.equal(picks[0][0], picks[1][0])
    units = addons.closest_views(F.normalize(z, dim=-1), F.normalize(other, dim=-1))
    assert not torch.equal(picks[0][0], units[0])  # raw outputs are compared, not directions


# ------------------------------------------------------------------ T7


def multi_crop(name: str, L: int, alpha: float | None) -> tuple[nn.Module, Batch]:
    return ready(name, 4, size=64, num_local=L, alpha=alpha)


@pytest.mark.parametrize("name", ["mocov2", "swav", "dino"])
@pytest.mark.parametrize(("L", "printed"), [(3, None), (6, 0.142857), (10, 0.090909)])
def test_t7_alpha_of_one_over_l_plus_one_is_the_plain_average(name: str, L: int, printed: float | None) -> None:
    """`None` is the plain average: the methods' equations above say so."""
    plain = step(*multi_crop(name, L, None))
    assert_same(step(*multi_crop(name, L, 1 / (1 + L))), plain, rtol=1e-6)
    if printed is not None:
        torch.testing.assert_close(step(*multi_crop(name, L, printed))[0], plain[0], rtol=2e-6, atol=0)
    assert (step(*multi_crop(name, L, 0.4))[0] - plain[0]).abs() > 1e-4


@pytest.mark.parametrize("name", ["mocov2", "swav", "dino"])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_t7_alpha_of_one_leaves_no_gradient_to_the_small_views(name: str, alpha: float) -> None:
    method, batch = multi_crop(name, 2, alpha)
    if name != "mocov2":
        method.projector.eval()  # its BatchNorm sees all views as one batch: the small ones act on the large ones there
    views = [x.clone().requires_grad_() for x in batch.views]
    method(dataclasses.replace(batch, views=views))[0].backward()
    queries = views[1:2] if name == "mocov2" else views[:2]
    assert all(x.grad.abs().sum() > 0 for x in queries)
    assert all((x.grad is not None and bool(x.grad.any())) == (alpha < 1) for x in views[2:])


# ------------------------------------------------------------------ T8


@pytest.mark.parametrize("K", [1, 2, 3, 7])
def test_t8_the_mean_of_k_draws_has_a_kth_of_their_covariance(K: int) -> None:
    A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.7]], dtype=torch.float64)
    z = torch.randn(K + 1, 100_000, 3, dtype=torch.float64) @ A + 5
    for t in mean_of_others(z):
        torch.testing.assert_close(torch.cov(t.T), A.T @ A / K, rtol=0.03, atol=0.03 / K)


def test_t8_distance_of_a_mean_from_the_expectation() -> None:
    """FastSiam's figure 2: E |mean of K - mu| of N(0, I) in 2048 dimensions is about sqrt(2048 / K)."""
    for K, printed in zip((1, 2, 3, 4), (45.2, 32.0, 26.1, 22.6), strict=True):
        distance = mean_of_others(torch.randn(K + 1, 100, 2048))[0].norm(dim=1).mean().item()
        assert abs(distance - printed) < 0.3


@pytest.mark.parametrize("M", [2, 5, 7])
def test_t8_draws_without_replacement_vary_less(M: int) -> None:
    """K of M fixed views: the covariance of their mean is Sigma / K (M - K) / (M - 1), over all subsets exactly."""
    z = torch.randn(M, 1, 3, dtype=torch.float64)

    def covariance(x_MD: Tensor) -> Tensor:
        return torch.cov(x_MD.T, correction=0)

    for K in range(1, M):
        expected = covariance(z[:, 0]) / K * (M - K) / (M - 1)
        torch.testing.assert_close(covariance(combine(z, K)[:, 0]), expected, rtol=1e-6, atol=1e-6)
    last = covariance(z[:, 0]) / (M - 1) / (M - 1)  # FastSiam's own draws: K = M - 1 of the views
    torch.testing.assert_close(covariance(mean_of_others(z)[:, 0]), last)


# ------------------------------------------------------------------ T12


@pytest.mark.parametrize("d", [16, 512])
def test_t12_the_monitor_tells_health_from_collapse(d: int) -> None:
    z = torch.randn(2, 1024, d)
    assert abs(feature_std(z).item() * math.sqrt(d) - 1) < 0.03
    assert feature_std(7 * z) == pytest.approx(feature_std(z).item())
    assert feature_std(torch.randn(d).expand(2, 64, d)) < 1e-6
    assert feature_std(torch.zeros(2, 64, d)) == 0


@pytest.mark.parametrize("name", ["simsiam", "fastsiam", "byol", "mocov3", "nnclr", "mocov2", "swav", "dino"])
def test_t12_the_methods_monitor_sees_a_collapse(name: str) -> None:
    """All images alike: every output is the same, whatever the network."""
    method, batch = ready(name, 8)
    healthy = method(batch)[1]["feature_std"]
    views = [x[:1].expand_as(x).contiguous(memory_format=torch.channels_last) for x in batch.views]
    method.eval()  # in train mode BatchNorm makes noise of what rounding leaves
    collapsed = method(dataclasses.replace(batch, views=[views[0]] * len(views)))[1]["feature_std"]
    assert healthy > 0.3 / math.sqrt(32)
    assert collapsed < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "best", "worst"),
    [
        ("simsiam", {}, -1, 1),
        ("fastsiam", {}, -1, 1),
        ("simsiam", {"guided": "guided"}, -1, 1),
        ("fastsiam", {"guided": "guided"}, -1, 1),
        ("byol", {}, 0, 8),
        ("byol", {"sum_directions": False}, -1, 1),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_t12_ends_of_the_losses(name: str, options: dict, best: float, worst: float, sign: int) -> None:
    """Alike views without a predictor agree fully; with h(z) = -z not at all; others lie between."""
    _, method, batch = made(name, **options)
    between = method(batch)[0].item()
    assert best < between < worst
    method.predictor = Times(sign)
    alike = dataclasses.replace(batch, views=[batch.views[0]] * len(batch.views))
    assert method(alike)[0].item() == pytest.approx(best if sign > 0 else worst, abs=1e-5)


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_t12_fast_mocos_loss_has_a_small_range() -> None:
    """T = 1 and 512 images: ln 512 = 6.24 by chance, 5.24 for orthogonal keys that are found."""
    unit, own = torch.eye(512), torch.arange(512)
    assert info_nce(unit, unit, 1.0, own).mean().item() == pytest.approx(5.24, abs=0.005)
    assert info_nce(torch.ones(512, 512), unit, 1.0, own).mean().item() == pytest.approx(6.24, abs=0.005)


# ------------------------------------------------------------------ T14


@pytest.mark.parametrize("temperature", [0.04, 0.1])
def test_t14_a_teacher_like_the_student_on_like_views(temperature: float) -> None:
    """The loss is the cross-entropy of the two softmaxes of one output; at equal temperatures, its entropy."""
    _, method, batch = made("dino", teacher_temperature=temperature)
    outputs: list[Tensor] = []
    method.prototypes.register_forward_hook(lambda _m, _i, out: outputs.append(out.detach()))
    loss, _ = method(dataclasses.replace(batch, views=[batch.views[0]] * 2))
    s = outputs[0][0]
    q, log_p = torch.softmax(s / temperature, -1), torch.log_softmax(s / 0.1, -1)
    torch.testing.assert_close(loss.detach(), -(q * log_p).sum(-1).mean())
    if temperature == 0.1:
        torch.testing.assert_close(loss.detach(), torch.distributions.Categorical(logits=s / 0.1).entropy().mean())


def test_t14_the_centre_moves_after_the_loss() -> None:
    method, batch = ready("dino", 4, center_momentum=0.6)
    method.center.copy_(0.2 * torch.randn(32))
    before, outputs = method.center.clone(), []
    method.target_prototypes.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    expected = dino(copy.deepcopy(method), batch.views)
    loss, _ = method(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method.center, before)
    method.after_backward(Progress(0, 2, 1))
    torch.testing.assert_close(method.center, 0.6 * before + 0.4 * outputs[0].mean((0, 1)))
    assert (method(batch)[0] - loss).abs() > 1e-4  # the next loss sees it
