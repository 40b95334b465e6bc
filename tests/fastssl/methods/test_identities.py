"""Methods against their equations, written out here image by image; and identities that hold between methods.

T1 to T14 are the properties that the methods must have. Elsewhere: combinations (T3) and Sinkhorn (T9) in test_ops,
numbers of terms (T4) in test_patches, stopped gradients (T4) in test_methods, distances (T6) in test_addons, the queue
(T10) in test_heads, learning rates (T11) in test_optim, votes of neighbours (T13) in test_evaluate.

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
from small import made
from torch import Tensor, nn

from fastssl.losses import guided as addons
from fastssl.losses.ops import divide, feature_std, mean_of_others, negative_cosine, sinkhorn
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
        codes = sinkhorn(rows.detach() @ C_PD.detach().T, m.config.epsilon, 3)[-len(z[i]) :]  # SwAV's: see test_ops
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
    """p of all combinations of 2 x 2 tiles: features averaged, then heads on the rows of all of them together."""
    s = x.shape[-1] // 2
    top, bottom = x[:, :, :s], x[:, :, s:]
    tiles = [top[..., :s], bottom[..., :s], top[..., s:], bottom[..., s:]]
    h = m.backbone(torch.cat(tiles).contiguous(memory_format=torch.channels_last)).chunk(4)
    means = [mean(list(some)) for some in itertools.combinations(h, m.config.combine)]
    return list(m.predictor(m.projector(torch.cat(means))).chunk(len(means)))


@torch.no_grad()
def shared(m: nn.Module, x: Tensor) -> Tensor:
    return m.projector(m.backbone(x))


def patched(distance: Callable[[nn.Module, Tensor, Tensor], Tensor], targets: Callable) -> Equation:
    """The mean of a distance over all pairs of a combination and the mean of the other whole views."""

    def equation(m: nn.Module, views: list[Tensor]) -> Tensor:
        t = [targets(m, x) for x in views]
        of_others = [mean([t[j] for j in range(len(t)) if j != i]) for i in range(len(t))]
        return mean([distance(m, p, of_others[i]) for i, x in enumerate(views) for p in combinations(m, x)])

    return equation


def with_extra_crop(m: nn.Module, views: list[Tensor]) -> Tensor:
    """Combinations of two views, and a third one whole that predicts both targets."""
    t = [target(m, x) for x in views[:2]]
    terms = [CE(p, t[1 - i], 1.0) for i in range(2) for p in combinations(m, views[i])]
    return mean(terms + [CE(online(m, views[2])[1], k, 1.0) for k in t])


def same_view(m: nn.Module, views: list[Tensor]) -> Tensor:
    return mean([CE(p, target(m, x), 1.0) for x in views for p in combinations(m, x)])


@pytest.mark.parametrize(
    ("name", "options", "equation"),
    [
        ("fastmoco", {}, patched(lambda _, p, t: CE(p, t, 1.0), target)),
        ("fastmoco", {"combine": 4, "temperature": 0.3}, patched(lambda _, p, t: CE(p, t, 0.3), target)),
        ("fastmoco", {"extra_crops": 1}, with_extra_crop),
        ("fastmoco", {"target_view": "same"}, same_view),
        ("simsiam", {}, patched(lambda _, p, t: D(p, t), shared)),
        ("fastsiam", {"num_views": 3}, patched(lambda _, p, t: D(p, t), shared)),
        ("byol", {}, patched(lambda _, p, t: 4 + 4 * D(p, t), target)),
        ("nnclr", {}, patched(lambda m, p, t: CE(nearest(m, t), p, m.config.temperature), shared)),
    ],
)
def test_combinatorial_patches_are_their_equation(name: str, options: dict, equation: Equation) -> None:
    assert_is(*ready(name, 5, size=64, patches="divide-encode-combine", **options), equation)


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
    heads = {"projector_layers": 3, "projector_bias": "all", "projector_norm": "affine", "predictor_bias": "all"}
    official = step(*ready("mocov3", temperature=temperature, **heads))
    assert_same(official, scaled(4 * temperature, one))


# ------------------------------------------------------------------ T3


@pytest.mark.parametrize("m", [2, 3])
def test_t3_swapping_tiles_does_not_change_the_loss(m: int) -> None:
    method, batch = ready("fastmoco", size=64, combine=m)
    tiles = [divide(x, 2) for x in batch.views]
    order = torch.tensor([2, 0, 3, 1])
    swapped = [t.unflatten(0, (4, -1))[order].flatten(0, 1) for t in tiles]
    found, expected = (step(method, dataclasses.replace(batch, tiles=some)) for some in (swapped, tiles))
    assert_same(found, expected)


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


def test_t8_distance_of_a_mean_from_the_expectation() -> None:
    """FastSiam's figure 2: E |mean of K - mu| of N(0, I) in 2048 dimensions is about sqrt(2048 / K)."""
    for K, printed in zip((1, 2, 3, 4), (45.2, 32.0, 26.1, 22.6), strict=True):
        distance = mean_of_others(torch.randn(K + 1, 100, 2048))[0].norm(dim=1).mean().item()
        assert abs(distance - printed) < 0.3


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
