"""--fit: which epochs, views and sizes let a run meet a budget of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastssl.config import schema as configs
from fastssl.config.schema import RunConfig
from fastssl.planning.forecast import Forecast
from fastssl.planning.schedule import Range
from fastssl.training.build import make_method
from loaders.errors import UserError


@dataclass(frozen=True)
class Option:
    """Flags that change how long the run takes."""

    flags: str
    seconds: Range
    basis: str
    factor: float = 1.0
    """Time of a step, as a multiple of the unchanged run's."""


def options(forecast: Forecast, budget: float) -> list[Option]:
    """The unchanged run, and changes with which it takes at most `budget` seconds.

    Of epochs, views and sizes the most expensive change that fits, else the cheapest. If neither views nor sizes alone
    fit, both together. Measures the loop a few times more.
    """
    views, schedules = _fewer_views(forecast), _schedules(forecast)
    found = [Option("(as it is)", forecast.seconds(), "measured"), _epochs(forecast, budget)]
    for choices in (views, schedules):  # from expensive to cheap
        found += [o for o in choices if o.seconds.value <= budget][:1] or choices[-1:]
    if views and schedules and min(o.seconds.value for o in (*views, *schedules)) > budget:
        changed = configs.replace(forecast.config, size_schedule=candidates(forecast.config.data.size)[-1])
        factor, flags = views[-1].factor, f"{views[-1].flags} {schedules[-1].flags}"
        basis = "derived: both gains multiplied"
        found.append(Option(flags, forecast.seconds(changed, factor), basis))
        if found[-1].seconds.value > budget:
            found.append(_epochs(forecast, budget, changed, factor, flags, basis))
    return found


def _epochs(
    forecast: Forecast,
    budget: float,
    config: RunConfig | None = None,
    factor: float = 1.0,
    flags: str = "",
    basis: str = "measured",
) -> Option:
    """The run, or `config`, a changed one, with as many epochs as fit."""
    config = config or forecast.config

    def seconds(epochs: int) -> Range:
        return forecast.seconds(configs.replace(config, epochs=epochs), factor)

    # Warm-up has to end, and each size has its epoch.
    fewest = max(int(config.optim.warmup_epochs) + 1, len(configs.sizes(config)))
    epochs = most_that_fit(lambda n: seconds(n).value, budget, fewest)
    return Option(f"{flags} --epochs {epochs}".strip(), seconds(epochs), basis)


def most_that_fit(seconds: Callable[[int], float], budget: float, fewest: int) -> int:
    """The largest n from `fewest` on with seconds(n) <= budget, which grows with n; `fewest` if there is none."""
    low, high = fewest, fewest + 1
    while seconds(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= budget else (low, middle)
    return low


def _fewer_views(forecast: Forecast) -> list[Option]:
    """The run with fewer views, down to 2, where the method has their number as an option."""
    found: list[Option] = []
    now = configs.to_dict(forecast.config)["method_options"].get("num_views", 2)
    if now <= 2:
        return found
    try:
        two = forecast.loop(num_views=2)[0].value / forecast.timings.loop[forecast.config.data.size].value
    except UserError:  # this variant of the method needs more
        return found
    for num in range(now - 1, 1, -1):
        # An image is read and decoded once, whatever K is. The rest grows with K in proportion.
        factor = two + (1 - two) * (num - 2) / (now - 2)
        basis = "measured" if num == 2 else f"derived: on a line from 2 to {now} views"
        found.append(Option(f"--num-views {num}", forecast.seconds(factor=factor), basis, factor))
    return found


def candidates(size: int) -> list[tuple[int, ...]]:
    """Size schedules that end at `size`, from expensive to cheap: 160:224, 128:160:224 and 128:128:224 for 224 px."""
    step = 32 if size >= 128 else 8
    small, middle = (max(step, round(size * share / step) * step) for share in (4 / 7, 5 / 7))
    return [sizes for sizes in ((middle, size), (small, middle, size), (small, small, size)) if sizes[0] < size]


def _schedules(forecast: Forecast) -> list[Option]:
    """The run with sizes that grow."""
    found = []
    for schedule in candidates(forecast.config.data.size):
        changed = configs.replace(forecast.config, size_schedule=schedule)
        try:
            configs.validate(changed)
            with torch.device("meta"):
                make_method(changed)
            forecast.measure_sizes(schedule)
        except UserError:  # not sizes that this network, or this cut into tiles, takes
            continue
        found.append(Option(f"--size-schedule {':'.join(map(str, schedule))}", forecast.seconds(changed), "measured"))
    return found
