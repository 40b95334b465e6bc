"""kNN against scikit-learn, features against a plain loop, and the command."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

from fastssl import evaluate
from fastssl.config.schema import load_yaml
from fastssl.evaluate import knn
from fastssl.evaluate.base import load_backbone
from fastssl.evaluate.command import main
from fastssl.evaluate.features import extract
from fastssl.evaluate.recalibrate import recalibrated
from fastssl.export import save_weights
from fastssl.networks.backbones import backbone
from fastssl.train import main as train_main
from fastssl.training.build import make_method
from loaders.beton import Reader


def clusters(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(5, 16, generator=torch.Generator().manual_seed(99))
    label = torch.randint(5, (num,), generator=generator)
    x = centre[label] + 1.5 * torch.randn(num, 16, generator=generator)
    return torch.nn.functional.normalize(x, dim=1), label


@pytest.mark.parametrize(("vote", "k"), [("weighted", 1), ("weighted", 7), ("weighted", 50), ("majority", 15)])
def test_knn_agrees_with_scikit_learn(vote: str, k: int) -> None:
    (bank, bank_label), (query, _) = clusters(300, 0), clusters(200, 1)
    ours = knn.classify(bank, bank_label, query, k=k, temperature=0.1, vote=vote).argmax(1)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.1)

    reference = KNeighborsClassifier(k, metric="cosine", weights=weights if vote == "weighted" else "uniform")
    reference.fit(bank.numpy(), bank_label.numpy())
    probability = np.sort(reference.predict_proba(query.numpy()), axis=1)
    decided = probability[:, -1] - probability[:, -2] > 1e-6  # ties are broken differently, on purpose
    assert decided.sum() > 150
    assert (ours.numpy() == reference.predict(query.numpy()))[decided].all()


def test_weighted_vote_at_high_temperature_is_the_majority_vote() -> None:  # T13
    (bank, bank_label), (query, _) = clusters(300, 0), clusters(200, 1)
    hot = knn.classify(bank, bank_label, query, k=20, temperature=1e7).argmax(1)
    majority = knn.classify(bank, bank_label, query, k=20, temperature=1.0, vote="majority").argmax(1)
    assert torch.equal(hot, majority)


def test_k_1_does_not_depend_on_the_temperature() -> None:  # T13
    (bank, bank_label), (query, _) = clusters(300, 0), clusters(200, 1)
    cold, hot = (knn.classify(bank, bank_label, query, k=1, temperature=t).argmax(1) for t in (0.01, 100.0))
    assert torch.equal(cold, hot)


def test_top_k_accuracy() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.3, 0.2]])
    assert knn.top_k_accuracy(scores, torch.tensor([1, 1]), 1) == 50
    assert knn.top_k_accuracy(scores, torch.tensor([1, 1]), 2) == 100
    assert knn.top_k_accuracy(scores, torch.tensor([2, 2]), 5) == 100  # cut to three classes


def test_features_are_those_of_a_plain_loop(beton: Path) -> None:
    net, _ = backbone("resnet18")
    net.train()
    reader = Reader(beton)
    features, labels = extract(net, reader, size=48, device=torch.device("cpu"), batch_size=20)
    assert net.training and torch.equal(labels, torch.from_numpy(np.array(reader.label)))
    net.eval()
    for i in (0, 21, 47):
        sample = reader[i]
        image = Image.open(io.BytesIO(bytes(sample.jpeg)))
        side = round(0.875 * min(image.size))
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        image = image.resize((48, 48), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        x = torchvision.transforms.functional.to_tensor(image)
        x = torchvision.transforms.functional.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.no_grad():
            expected = torch.nn.functional.normalize(net(x[None]), dim=1)[0]
        assert torch.nn.functional.cosine_similarity(features[i], expected, dim=0) > 0.999


def test_limit_spreads_over_the_file(beton: Path) -> None:
    net, _ = backbone("resnet18")
    options = {"size": 32, "device": torch.device("cpu")}
    whole, _ = extract(net, Reader(beton), **options)
    some, labels = extract(net, Reader(beton), limit=12, **options)
    assert len(some) == len(labels) == 12
    torch.testing.assert_close(some, whole[::4], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def run(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    network = ["--backbone", "resnet18", "--size", "32", "--dim", "32", "--predictor-hidden", "8"]
    steps = ["--batch-size", "8", "--epochs", "1", "--max-steps", "2"]
    assert train_main(["--data", str(beton), "--out", str(folder), *network, *steps]) == 0
    return folder


def test_the_command_compares_with_random_initialisation(
    run: Path, beton: Path, val_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "knn.json"
    data = ["--data", str(beton), "--val", str(val_beton)]
    assert main(["knn", str(run), *data, "--k", "1", "5", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results.keys() == {"weights", "random"}
    assert results["weights"].keys() == {"weighted k=1", "weighted k=5", "majority k=1", "majority k=5"}
    assert results["weights"]["weighted k=1"] == results["weights"]["majority k=1"]
    text = capsys.readouterr().out
    assert "random init" in text and "top1" in text and "top5" in text
    # The weights file alone says what it is, too.
    assert main(["knn", str(run / "weights.safetensors"), *data, "--k", "5", "--no-random", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["weights"]["weighted k=5"] == results["weights"]["weighted k=5"]


def test_recalibrated_weights_are_reported_beside_the_others(
    run: Path, beton: Path, val_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    out, data = tmp_path / "knn.json", ["--data", str(beton), "--val", str(val_beton), "--k", "5"]
    assert main(["knn", str(run), *data, "--recalibrate-bn", "24", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert list(results) == ["weights", "recalibrated", "random"]
    assert "top1 (recalibrated)" in capsys.readouterr().out
    assert main(["knn", str(run), *data, "--no-random", "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == {"weights": results["weights"]}
    # What the table says of them is what the same weights with these statistics score.
    net, _, size = load_backbone(run, None, None, seed=0)
    made = recalibrated(net, Reader(beton), size=size, device=torch.device("cpu"), images=24)
    save_weights(tmp_path / "made.safetensors", made, {"backbone": "resnet18", "size": size})
    assert main(["knn", str(tmp_path / "made.safetensors"), *data, "--no-random", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["weights"] == results["recalibrated"]


def test_random_initialisation_is_where_the_run_began(run: Path) -> None:
    _, random_net, size = load_backbone(run, None, None, seed=0)
    assert size == 32
    began = make_method(load_yaml(run / "config.yaml")).backbone.state_dict()
    assert all(torch.equal(v, began[k]) for k, v in random_net.state_dict().items())


COUNT = '''"""How many images of one class there are to classify, whatever the network."""

from dataclasses import dataclass

from fastssl.evaluate.base import Evaluation, Results, Task


@dataclass(kw_only=True)
class Count(Evaluation):
    """Counting"""

    label: int = 0
    """Class that is counted."""

    def run(self, task: Task) -> Results:
        return {f"class {self.label}": {"images": float((task.val.label == self.label).sum())}}
'''


def test_an_evaluation_is_one_new_file(
    run: Path, beton: Path, val_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = evaluate.available()
    assert "knn" in before
    (tmp_path / "count.py").write_text(COUNT)
    monkeypatch.setattr(evaluate, "__path__", [*evaluate.__path__, str(tmp_path)])
    assert evaluate.available() == sorted(["count", *before])
    assert main(["count", str(run), "--data", str(beton), "--val", str(val_beton), "--label", "2"]) == 0
    text = capsys.readouterr().out
    assert "class 2" in text and text.count("5.00") == 2  # of 20 images in 4 classes, twice
    with pytest.raises(SystemExit):
        main(["count", "--help"])
    text = capsys.readouterr().out
    assert "whatever the network" in text and "Class that is counted." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["knm", "RUN"], "did you mean 'knn'"),
        (["knn", "/nowhere", "DATA"], "no weights at /nowhere"),
        (["knn", "RUN"], "give --data"),
        (["knn", "RUN", "DATA", "--k", "4000"], "holds only 48 images"),
        (["knn", "RUN", "DATA", "--backbone", "resnet50"], "does not fit a resnet50"),
        (["knn", "BARE", "DATA"], "give --backbone NAME and --size PX"),
        (["knn", "TEXT", "DATA"], "not a safetensors file"),
        (["knn", "FOLDER", "DATA"], "the run has not ended"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, run: Path, beton: Path, val_beton: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    bare, text = tmp_path / "bare.safetensors", tmp_path / "text.safetensors"
    save_file({"x": torch.zeros(1)}, bare)
    text.write_text("hello")
    names = {"RUN": [run], "BARE": [bare], "TEXT": [text], "FOLDER": [tmp_path]}
    names["DATA"] = ["--data", beton, "--val", val_beton]
    capsys.readouterr()
    assert main([str(x) for a in arguments for x in names.get(a, [a])]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
