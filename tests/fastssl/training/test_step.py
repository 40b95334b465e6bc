"""Parts of a training step that have no test of their own elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import config_of
from torch import nn

from fastssl.config import schema as configs
from fastssl.training import checkpoint
from fastssl.training.build import make_views
from fastssl.training.optimizers import clip_each_norm
from loaders import UserError


def test_each_gradient_is_clipped_by_itself() -> None:
    short, long, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    short.grad, long.grad = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    clip_each_norm([short, long, none], 3.0)
    torch.testing.assert_close(short.grad, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(long.grad, torch.tensor([1.8, 2.4]))
    assert none.grad is None


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_interpolation_is_that_of_all_crops(interpolation: str) -> None:
    config = configs.replace(config_of("swav", num_local=2), recipe="swav", interpolation=interpolation)
    assert {view.interpolation for view in make_views(config).views} == {interpolation}


def test_a_checkpoint_of_another_version_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", checkpoint.VERSION - 1)
        checkpoint.save(tmp_path, {"step": 3})
        assert checkpoint.load(tmp_path)["step"] == 3
    with pytest.raises(UserError, match="finish the run with the fastssl that began it"):
        checkpoint.load(tmp_path)
