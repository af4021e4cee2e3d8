"""LPIPS: laws of a distance, and parity with a torch module written from the paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.weights.torch_params import from_torch, to_torch
from vae16 import LPIPS, LPIPS_OPTIONAL, LPIPS_PACKAGE_RULES, LPIPS_RULES, LPIPSConfig

torch = pytest.importorskip("torch")

WIDTHS = (4, 6, 8, 8, 10)
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


class Oracle(torch.nn.Module):
    """torchvision's VGG16 `features` and the heads of the lpips package, with narrow stages."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        previous = 3
        for width, depth in zip(WIDTHS, (2, 2, 3, 3, 3), strict=True):
            for _ in range(depth):
                layers += [torch.nn.Conv2d(previous, width, 3, padding=1), torch.nn.ReLU()]
                previous = width
            layers.append(torch.nn.MaxPool2d(2))
        self.features = torch.nn.Sequential(*layers)
        self.heads = torch.nn.ModuleList(torch.nn.Conv2d(w, 1, 1, bias=False) for w in WIDTHS)
        for head in self.heads:
            torch.nn.init.uniform_(head.weight, 0.0, 1.0)

    def named(self) -> dict[str, np.ndarray]:
        tensors = {f"features.{k}": v.detach().numpy() for k, v in self.features.state_dict().items()}
        return tensors | {f"lin{i}.model.1.weight": h.weight.detach().numpy() for i, h in enumerate(self.heads)}

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        deviation = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        x, y = (x - mean) / deviation, (y - mean) / deviation
        total = torch.zeros(len(x))
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in (3, 8, 15, 22, 29):
                a, b = (f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
                total = total + self.heads[(3, 8, 15, 22, 29).index(i)]((a - b) ** 2).mean((1, 2, 3))
        return total


@pytest.fixture(scope="module")
def pair():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    oracle, net = Oracle(), LPIPS(LPIPSConfig(channels=WIDTHS))
    blank = jnp.zeros((1, 16, 16, 3))
    like = jax.eval_shape(net.init, jax.random.key(0), blank, blank)["params"]
    extra = {"classifier.0.weight": np.zeros((2, 2)), "scaling_layer.shift": np.zeros(3)}
    params = from_torch(oracle.named() | extra, like, LPIPS_RULES, optional=LPIPS_OPTIONAL)
    run = jax.jit(lambda p, x, y: net.apply({"params": p}, x, y))
    return oracle, run, params


def images(seed: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (2, 32, 40, 3), minval=-1.0)


def test_parity_with_torch(pair):
    oracle, run, params = pair
    x, y = images(0), images(1)
    with torch.no_grad():
        want = oracle(*(torch.from_numpy(np.array(v)).permute(0, 3, 1, 2) for v in (x, y))).numpy()
    assert np.abs(np.asarray(run(params, x, y)) - want).max() <= 1e-4 * np.abs(want).max()


def test_is_a_distance(pair):
    _, run, params = pair
    x, y = images(0), images(1)
    np.testing.assert_allclose(run(params, x, x), 0.0, atol=1e-10)
    np.testing.assert_allclose(run(params, x, y), run(params, y, x), rtol=1e-4)
    assert (run(params, x, y) > 0).all()
    assert (run(params, x, 0.9 * x + 0.1 * y) < run(params, x, y)).all()


def test_gradient_is_finite_where_features_vanish(pair):
    _, run, params = pair
    dead = jax.tree.map(lambda leaf: -np.abs(leaf), params)
    gradient = jax.jit(jax.grad(lambda y: run(dead, images(0), y).sum()))(images(1))
    assert np.isfinite(gradient).all()


def test_names_of_both_published_layouts_round_trip(pair):
    _, _, params = pair
    for rules, first in ((LPIPS_RULES, "features.0.weight"), (LPIPS_PACKAGE_RULES, "net.slice1.0.weight")):
        names = to_torch(params, rules)
        assert len(names) == 2 * len(CONVOLUTIONS) + 5
        assert {first, "lin4.model.1.weight"} <= names.keys()
        again = from_torch(names, params, rules)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, b)
    slices = {name.split(".")[1] + "." + name.split(".")[2] for name in names if name.startswith("net.")}
    stage = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    assert slices == {f"slice{s}.{i}" for i, s in stage.items()}


def test_small_images_are_refused():
    net = LPIPS(LPIPSConfig(channels=WIDTHS))
    with pytest.raises(ValueError, match="16x16"):
        net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8, 3)))
